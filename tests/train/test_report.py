"""Evaluations and their reports: figures, intervals, pages, and that an interrupted one goes on."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from train.cli import app
from train.config import ConfigError, make_config
from train.evaluate.attacks import AttackRate
from train.evaluate.base import Kind, Question
from train.evaluate.compare import Cell, Row, summarise_cells
from train.evaluate.evaluation import Effort, Evaluation, Subject, choose_shown, evaluate
from train.evaluate.exam import Answer
from train.evaluate.report import (
    cells,
    comparison_chart,
    describe,
    fidelity,
    fires,
    lines,
    markdown,
    roc_chart,
    summary,
    words,
    write_comparison,
    write_evaluation,
)
from train.evaluate.scores import interval, rate, wilson
from train.evaluate.suite import Assignment, SuiteError
from train.loop import Event
from train.run import train
from unhype import checkpoint

from .conftest import TinyDenoiser, small_data
from .painter import SAMPLING, Eye, Painter, Studio

runner = CliRunner()
TARGET = Question(Kind.TARGET, "a cat", ("cat",), "cat")
SYNONYM = Question(Kind.SYNONYM, "a feline", ("cat",), "feline")
UNKNOWN = Question(Kind.SYNONYM, "a moggy", ("cat",), "moggy")
OTHER = Question(Kind.UNRELATED, "a bus", ("bus",), "bus")
SCENE = Question(Kind.SCENE, "a cat and a bus", ("cat", "bus"), "cat")
PLAIN = Question(Kind.PLAIN, "<script>alert(1)</script> & rain", ())
QUESTIONS = (TARGET, SYNONYM, OTHER, SCENE, PLAIN)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack."""
    config = make_config(small_data(tmp_path_factory.mktemp("pack")), ["gate.steps=200"])
    return train(config, denoiser=TinyDenoiser()).path


@pytest.fixture
def subject(path: Path) -> Subject:
    return Subject(path, checkpoint.load(path), Painter(), Eye(), "eye")


ASSIGNMENT = Assignment("mine", QUESTIONS, Eye.labels, SAMPLING, 2, {"my {}": "my {}"}, True)


def answer(question: Question, **values: object) -> Answer:
    plain = Answer(question, False, True, True, False, 0.5, 20.0, 0.25)
    return replace(plain, **values)  # pyright: ignore[reportArgumentType]


ANSWERS = (
    *[answer(TARGET, hit=number == 0) for number in range(4)],
    *[answer(SYNONYM) for _ in range(2)],
    *[answer(UNKNOWN, hit=True, base_hit=False) for _ in range(2)],
    answer(OTHER, hit=True, acts=False, identical=True, ssim=1.0, psnr=100.0, distance=0.0),
    answer(OTHER, hit=False, acts=False),
    answer(SCENE, hit=False, other=True, base_other=False),
    answer(PLAIN, acts=False, identical=True, ssim=1.0, psnr=100.0, distance=0.0),
)


def test_figures_stand_beside_those_of_the_model_itself() -> None:
    found = {line.key: line for line in lines(ANSWERS)}
    both = {
        key: (line.value and line.value.value, line.base and line.base.value)
        for key, line in found.items()
    }
    assert both["acc_e"] == (0.25, 1.0)
    assert both["acc_g"] == (0.0, 1.0)  # without the word that the model does not know
    assert both["acc_s"] == (0.5, 1.0)
    assert both["acc_s_siblings"] == (None, None)
    assert both["scene_erased"] == (0.0, 1.0)
    assert both["scene_other"] == (1.0, 0.0)
    assert both["h_o"] == (pytest.approx(3 / (1 / 0.75 + 2 + 1)), 0.0)
    assert (found["acc_g"].prompts, found["acc_g"].pictures) == (1, 2)


def test_a_single_prompt_has_an_interval_over_its_pictures() -> None:
    found = {line.key: line.value for line in lines(ANSWERS)}
    for key in ("acc_e", "acc_s", "h_o"):
        one = found[key]
        assert one
        assert one.low < one.value < one.high


def test_an_interval_counts_prompts_not_pictures() -> None:
    prompts = [replace(OTHER, text=str(number)) for number in range(8)]
    few = [answer(q, hit=index % 2 == 0) for index, q in enumerate(prompts)]
    once = interval(few, lambda a: a.hit)
    often = interval(few * 20, lambda a: a.hit)
    assert once
    assert once.value == 0.5
    assert once == often


def test_nothing_found_is_not_nothing_there() -> None:
    none = [answer(replace(OTHER, text=str(number)), hit=False) for number in range(10)]
    found = rate(none, lambda a: a.hit)
    assert found
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.2775, abs=1e-3)  # 3.84 / (10 + 3.84)
    assert rate([], lambda a: a.hit) is None


def test_wilsons_interval_is_the_known_one() -> None:
    found = wilson(8, 10)
    assert found
    assert (found.low, found.high) == (
        pytest.approx(0.4902, abs=1e-3),
        pytest.approx(0.9433, abs=1e-3),
    )
    assert wilson(0, 0) is None


def test_fires_are_counted_once_a_prompt() -> None:
    found = fires(ANSWERS, [Kind.UNRELATED, Kind.PLAIN])
    assert found == wilson(0, 2)
    assert fires(ANSWERS, [Kind.SYNONYM]) == wilson(2, 2)


def test_fidelity_tells_apart_what_changed() -> None:
    rows = {row["of"]: row for row in fidelity(ANSWERS)}
    assert rows["all of them"]["pictures"] == 3
    assert rows["all of them"]["identical"].value == pytest.approx(2 / 3)
    assert rows["those that changed"]["ssim"].value == 0.5
    assert rows["unrelated"]["psnr"] == 60.0


def test_words_that_the_model_does_not_know_are_marked() -> None:
    rows = {row["word"]: row for row in words(ANSWERS) if row["kind"] == Kind.SYNONYM.value}
    assert rows["moggy"]["left_out"]
    assert not rows["feline"]["left_out"]


def test_what_is_shown_is_spread_over_every_kind() -> None:
    many = [replace(OTHER, text=str(number)) for number in range(40)]
    assert choose_shown([TARGET, *many, PLAIN]) == [0, 1, 11, 21, 31, 41]


def test_an_evaluation_goes_on_where_it_stopped(subject: Subject, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage.startswith("seed 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(subject, ASSIGNMENT, tmp_path / "broken", report=stop)
    stages: list[str] = []
    resumed = evaluate(
        subject, ASSIGNMENT, tmp_path / "broken", report=lambda event: stages.append(event.stage)
    )
    assert stages
    assert not [stage for stage in stages if stage.startswith("seed 0")]
    whole = evaluate(subject, ASSIGNMENT, tmp_path / "whole", report=lambda event: None)
    assert resumed == whole
    assert len(whole.answers) == 2 * len(QUESTIONS)
    assert [a.acts for a in whole.answers[:5]] == [True, False, False, True, False]
    assert all(a.identical for a in whole.answers if not a.acts)
    assert not any(a.identical for a in whole.answers if a.acts)


def test_other_settings_start_anew(subject: Subject, tmp_path: Path) -> None:
    evaluate(subject, ASSIGNMENT, tmp_path, report=lambda event: None)
    stages: list[str] = []
    more = replace(ASSIGNMENT, sampling=replace(SAMPLING, steps=3))
    evaluate(subject, more, tmp_path, report=lambda event: stages.append(event.stage))
    assert any(stage.startswith("seed 0") for stage in stages)


def test_another_text_encoder_starts_anew(subject: Subject, tmp_path: Path) -> None:
    part = tmp_path / "t5xxl.safetensors"
    stages: list[list[str]] = []
    for content in (b"", b"other", b"other"):
        part.write_bytes(content)
        stages.append([])
        evaluate(
            replace(subject, parts=(part,)),
            ASSIGNMENT,
            tmp_path / "out",
            report=lambda event: stages[-1].append(event.stage),
        )
    first, second, third = stages
    assert first == second
    assert len(third) < len(first)


def test_a_label_that_the_evaluator_lacks_is_named_first(subject: Subject, tmp_path: Path) -> None:
    ship = Question(Kind.UNRELATED, "a ship", ("ship",), "ship")
    asked = replace(ASSIGNMENT, questions=(*QUESTIONS, ship))
    with pytest.raises(SuiteError, match="eye cannot see 'ship'"):
        evaluate(subject, asked, tmp_path, report=lambda event: None)


def test_attacks_need_a_model_with_tokens(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no access to its tokens.*Leave out --attacks"):
        evaluate(subject, ASSIGNMENT, tmp_path, attacks=Effort(), report=lambda event: None)


def test_a_pack_of_other_layers_is_refused(subject: Subject) -> None:
    info = subject.pack.info
    grown = (replace(info.targets[0], name="elsewhere"), *info.targets[1:])
    pack = replace(subject.pack, info=replace(info, targets=grown))
    with pytest.raises(ConfigError, match="layers of tiny that tiny does not have"):
        replace(subject, pack=pack)


def test_the_page_stands_alone_and_shows_everything(subject: Subject, tmp_path: Path) -> None:
    curve = {
        "threshold": [0.1, 0.5, 0.9],
        "false_fire_rate": [0.2, 0.01, 0.0],
        "miss_rate": [0.0, 0.05, 0.4],
    }
    info = replace(subject.pack.info, metrics={"gate_roc": curve})
    subject = replace(subject, pack=replace(subject.pack, info=info))
    found = evaluate(subject, ASSIGNMENT, tmp_path, report=lambda event: None)
    attacks = (
        AttackRate("none", 4, 0.0, 1.0, 0.0, 0.0),
        AttackRate("interpolation 0.5", 4, 0.25, 0.5, None, 0.5, share=0.5),
    )
    found = Evaluation(found.seeds, ANSWERS, found.shown, attacks)
    report = describe(subject, ASSIGNMENT, found)
    write_evaluation(tmp_path, report, found)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; rain" in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert page.count("data:image/png") == 2 + 2 * 2 * len(QUESTIONS)
    assert "25.0 % (" in page
    assert "Not held out, as the suite says: “my {}”" in page
    assert "interpolation 0.5" in page
    printed = dict(summary(report))
    assert printed["attack: interpolation 0.5"].startswith("25.0 %")
    assert "not asked" not in " ".join(printed.values())


def test_a_roc_chart_is_a_picture() -> None:
    curve = {"threshold": [0.5], "false_fire_rate": [0.0], "miss_rate": [0.0]}
    assert Image.open(io.BytesIO(roc_chart(curve, 0.5))).size[0] > 300


@pytest.fixture
def rows() -> list[Row]:
    base = tuple(replace(a, hit=a.base_hit) for a in ANSWERS)
    cells = []
    for size in (1, 4):
        for seed in (0, 1):
            cells += [
                Cell("none", size, seed, 0.0, 0, base),
                Cell("ours", size, seed, 61.0, 2048, ANSWERS),
            ]
    return summarise_cells(cells)


def test_a_comparison_is_a_table_a_chart_and_a_page(rows: list[Row], tmp_path: Path) -> None:
    write_comparison(tmp_path, rows, world="<here>", sampling=SAMPLING)
    plain = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert [(row["method"], row["concepts"], row["seeds"]) for row in plain] == [
        ("none", 1, 2),
        ("ours", 1, 2),
        ("none", 4, 2),
        ("ours", 4, 2),
    ]
    table = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert table.startswith("**1 concept, 2 tasks**\n\n| method | H_o |")
    assert re.search(
        r"\| ours \| 69\.2 \([\d.]+–[\d.]+\) \| 25\.0 \| 0\.0 \| 50\.0 \| – \| – \| 61 s \| 2 KiB \|",
        table,
    )
    assert "| none | 0.0 (0.0–0.0) | 100.0 | 100.0 | 100.0 | – | – | – | – |" in table
    assert Image.open(tmp_path / "chart.png").size == (1210, 770)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "the world “&lt;here&gt;”" in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)


def test_a_chart_takes_a_single_size_and_missing_figures(rows: list[Row]) -> None:
    plain = [row.plain() for row in rows if row.concepts == 1]
    assert comparison_chart(plain).startswith(b"\x89PNG")
    assert len(cells(plain[0])) == 8
    assert markdown(plain).count("\n| ") == 3


def test_answers_are_what_the_report_says_of_them(subject: Subject, tmp_path: Path) -> None:
    found = evaluate(subject, ASSIGNMENT, tmp_path, report=lambda event: None)
    report = describe(subject, ASSIGNMENT, found)
    assert report["pictures"] == len(found.answers)
    assert report["sampling"] == asdict(SAMPLING)
    assert report["seeds"] == [0, 1]
    assert report["held_out"] == {"checked": True, "trained": {"my {}": "my {}"}}
    assert report["versions"]["torch"] == torch.__version__


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the command line find the small world, evaluator and model."""
    monkeypatch.setattr("train.cli.find_world", lambda name: Studio(tmp_path))
    monkeypatch.setattr("train.cli.find_evaluator", lambda spec, labels: Eye(tuple(labels)))
    monkeypatch.setattr("train.cli.Denoiser.load", lambda path, comfyui, pictures=False: Painter())


SUITE = """
things: {cat: {}, bus: {phrases: [coach]}}
templates: ["my {} at last"]
plain: ["nothing much"]
sampling: {steps: 2, size: 16}
seeds: 2
"""


def test_eval_on_the_command_line(path: Path, installed: None, tmp_path: Path) -> None:
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    command = ["eval", str(path), "--checkpoint", "tiny.safetensors", "--suite", str(suite)]
    command += ["--evaluator", "eye", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "erased name, recognised (Acc_e)" in result.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    again = runner.invoke(app, [*command, "--seeds", "1", "--json"])
    report = json.loads(again.stdout)
    assert (report["suite"], report["evaluator"]["name"], report["seeds"]) == ("small", "eye", [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give either --suite"),
        (["--suite", "a.yaml", "--world", "studio"], "Give either --suite"),
        (["--suite", "{suite}"], "--evaluator is missing"),
        (["--suite", "{suite}", "--evaluator", "eye"], "--checkpoint is missing"),
        (["--suite", "none.yaml"], "There is no suite none.yaml"),
        (["--world", "studio"], "has no questions for packs. Give --suite"),
    ],
)
def test_eval_says_what_is_missing(
    options: list[str], message: str, path: Path, installed: None, tmp_path: Path
) -> None:
    suite = tmp_path / "small.yaml"
    suite.write_text(SUITE, encoding="utf-8")
    filled = [option.format(suite=suite) for option in options]
    result = runner.invoke(app, ["eval", str(path), *filled])
    assert result.exit_code == 2
    assert message in result.stderr


def test_compare_on_the_command_line(installed: None, tmp_path: Path) -> None:
    command = ["compare", "--world", "studio", "--concepts", "1", "--seeds", "1"]
    command += ["--methods", "none, static", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "| static | " in result.stdout
    names = {file.name for file in (tmp_path / "out").iterdir() if file.is_file()}
    assert names == {"compare.json", "compare.md", "compare.html", "chart.png"}
    again = runner.invoke(app, [*command, "--json"])
    assert [row["method"] for row in json.loads(again.stdout)] == ["none", "static"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concepts", "1,two"], "--concepts is '1,two', expected whole numbers"),
        (["--concepts", "2"], "1 to 1 concepts, got 2"),
        (["--methods", "none,magic"], "no method 'magic'"),
    ],
)
def test_compare_says_what_is_wrong(
    options: list[str], message: str, installed: None, tmp_path: Path
) -> None:
    result = runner.invoke(app, ["compare", "--world", "studio", "--out", str(tmp_path), *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_two_processes_share_the_tasks_and_train_each_alone(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_comparers.py")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    result = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| ours direct | ") == 1
    rows = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [(row["method"], row["seeds"]) for row in rows] == [("none", 3), ("ours direct", 3)]
    pack = checkpoint.load(tmp_path / "out" / "packs" / "1-0" / "direct.safetensors")
    config = Studio(tmp_path).task(1, 0).config
    config = config.model_copy(update={"output": tmp_path / "single.safetensors"})
    single = checkpoint.load(train(config, denoiser=Painter()).path)
    for name, value in single.hypernetwork.state_dict().items():
        torch.testing.assert_close(pack.hypernetwork.state_dict()[name], value)
