"""Training without a config file, plans, calibration and export on the command line."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
import yaml
from torch import Tensor
from typer.core import TyperGroup
from typer.testing import CliRunner

from train import state
from train.cli import app
from train.config import TrainConfig, load_config, make_config
from train.denoiser import files_of
from train.record import metrics_path
from train.run import Event, Result, train
from unhype import checkpoint
from unhype.families import FAMILIES
from unhype.host.denoise import ModelFiles

from .conftest import TinyDenoiser, small_data

runner = CliRunner()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A pack."""
    config = make_config(small_data(tmp_path_factory.mktemp("pack")), ["gate.steps=200"])
    return train(config, denoiser=TinyDenoiser()).path.read_bytes()


@pytest.fixture
def model(tmp_path: Path, denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that loads as the tiny denoiser."""
    path = tmp_path / "tiny.safetensors"
    path.touch()
    monkeypatch.setattr("train.cli.Denoiser.load", lambda path, comfyui: denoiser)
    monkeypatch.setattr("train.cli.run", partial(train, denoiser=denoiser))
    return path


@pytest.fixture
def pack(tmp_path: Path, trained: bytes) -> Path:
    path = tmp_path / "pack.safetensors"
    path.write_bytes(trained)
    return path


@pytest.fixture
def words(model: Path, tmp_path: Path, data: dict[str, object]) -> list[str]:
    """A small run in options."""
    small = [
        f"{section}.{name}={value}"
        for section in ("network", "gate", "trajectories", "train")
        for name, value in dict(data[section]).items()  # pyright: ignore[reportArgumentType, reportCallIssue]
    ]
    options = ["--checkpoint", str(model), "--erase", "cat, kitty", "--anchor", "an empty meadow"]
    return [
        *options,
        "--output",
        str(tmp_path / "out" / "cat.safetensors"),
        *(part for value in small for part in ("--set", value)),
    ]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"a photo of a {w}\n" for w in ("zebra", "violin", "lamp", "cat")))
    return path


def test_a_run_in_words_and_the_file_it_leaves_make_the_same_pack(
    words: list[str], tmp_path: Path
) -> None:
    done = runner.invoke(app, ["train", *words])
    assert done.exit_code == 0, done.stderr
    file, pack = tmp_path / "out" / "cat.yaml", tmp_path / "out" / "cat.safetensors"
    assert f"The settings are in {file}" in done.stderr
    assert done.stdout.startswith(f"{pack} (")
    assert len(done.stdout.splitlines()) == 1
    assert checkpoint.read_info(pack).concepts[0].target == ("cat", "kitty")
    again = runner.invoke(
        app, ["train", str(file), "--set", f"output={tmp_path / 'b.safetensors'}"]
    )
    assert again.exit_code == 0, again.stderr
    first, second = (state.read(path)[0] for path in (pack, tmp_path / "b.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {file.name, pack.name, metrics_path(pack).name}


def test_an_interrupted_run_in_words_goes_on_from_its_file(
    words: list[str], tmp_path: Path, denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: TrainConfig, **kwargs: object) -> Result:
        def press(event: Event) -> None:
            if event.values and event.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

        return train(config, denoiser=denoiser, progress=press)

    with monkeypatch.context() as patch:
        patch.setattr("train.cli.run", interrupted)
        assert runner.invoke(app, ["train", *words]).exit_code == 130
    steps: list[int] = []

    def resumed(config: TrainConfig, **kwargs: object) -> Result:
        return train(
            config, denoiser=denoiser, progress=lambda e: steps.append(e.step) if e.values else None
        )

    monkeypatch.setattr("train.cli.run", resumed)
    assert runner.invoke(app, ["train", str(tmp_path / "out" / "cat.yaml")]).exit_code == 0
    assert steps[0] == 5


def test_text_encoders_in_files_of_their_own_are_named_in_the_settings(
    words: list[str], tmp_path: Path
) -> None:
    encoders = [tmp_path / name for name in ("clip_l.safetensors", "t5xxl.safetensors")]
    options = [part for path in encoders for part in ("--text-encoder", str(path))]
    absent = runner.invoke(app, ["train", *words, *options])
    assert absent.exit_code == 2
    assert "there is no text encoder" in absent.stderr
    for path in encoders:
        path.touch()
    done = runner.invoke(app, ["train", *words, *options])
    assert done.exit_code == 0, done.stderr
    written = load_config(tmp_path / "out" / "cat.yaml")
    assert written.text_encoders == tuple(encoders)
    assert files_of(written).text_encoders == tuple(encoders)


def test_commands_that_read_prompts_load_the_text_encoders_they_are_given(
    pack: Path, captions: Path, tmp_path: Path, denoiser: TinyDenoiser, monkeypatch
) -> None:
    loaded: list[ModelFiles] = []

    def load(files: ModelFiles, comfyui: object, *, pictures: bool = False) -> TinyDenoiser:
        loaded.append(files)
        return denoiser

    monkeypatch.setattr("train.cli.Denoiser.load", load)
    files = ["--checkpoint", "model.sft", "--text-encoder", "l.sft", "--text-encoder", "t5.sft"]
    lora = str(tmp_path / "lora.safetensors")
    for command in (
        ["calibrate", str(pack), "--captions", str(captions), "--budget", "0.9"],
        ["export", str(pack), "--prompt", "a cat", "-o", lora, "--force"],
    ):
        done = runner.invoke(app, [*command, *files])
        assert done.exit_code == 0, done.stderr
    wanted = ModelFiles(Path("model.sft"), (Path("l.sft"), Path("t5.sft")))
    assert loaded == [wanted, wanted]


def test_evaluating_refuses_parts_of_no_model(pack: Path) -> None:
    done = runner.invoke(app, ["eval", str(pack), "--vae", "vae.sft", "--world", "demo"])
    assert done.exit_code == 2
    assert "--text-encoder and --vae go with --checkpoint" in " ".join(done.stderr.split())


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_file_and_options_exclude_one_another(
    command: str, words: list[str], tmp_path: Path
) -> None:
    both = runner.invoke(app, [command, "run.yaml", *words])
    assert both.exit_code == 2
    assert (
        "Give the config file run.yaml or --checkpoint, --erase, --anchor, --output, not both"
        in (" ".join(both.stderr.split()))
    )
    neither = runner.invoke(app, [command])
    assert neither.exit_code == 2
    assert "Nothing says what to train" in neither.stderr
    absent = runner.invoke(app, [command, "--checkpoint", "no.ckpt", *words[2:6]])
    assert absent.exit_code == 2
    assert "there is no checkpoint no.ckpt" in absent.stderr
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_options_is_a_sentence(words: list[str]) -> None:
    done = runner.invoke(app, ["train", *words, "--set", "train.lr=-1", "--anchor", "a cat"])
    assert done.exit_code == 2
    assert "Got 1 --erase and 2 --anchor" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_for_machines(words: list[str], tmp_path: Path) -> None:
    done = runner.invoke(app, ["plan", *words, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert found["target_modules"] == 4
    assert found["memory"]["expected"] > found["memory"]["measured"]
    assert found["device_memory"] is None
    assert not (tmp_path / "out").exists()


def test_a_plan_in_a_pipe_is_plain_lines(
    model: Path, tmp_path: Path, data: dict[str, object]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**data, "checkpoint": str(model)}))
    done = runner.invoke(app, ["plan", str(config)])
    assert done.exit_code == 0, done.stderr
    rows = dict(line.split("\t") for line in done.stdout.splitlines())
    assert rows["training time"].startswith("about ")
    assert "bytes" in rows["pack"]
    assert "4 target modules" in rows["changes"]


def test_calibrate_writes_the_threshold_and_says_what_it_costs(
    pack: Path, model: Path, captions: Path
) -> None:
    command = ["calibrate", str(pack), "--checkpoint", str(model), "--captions", str(captions)]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert "captions that fire\t0.000% of 3, were " in done.stdout
    assert "left out\t1 that mention an erased phrase, 0 retained in training" in done.stdout
    again = runner.invoke(app, [*command, "--budget", "0.5", "--json"])
    found = json.loads(again.stdout)
    assert found["calibration"]["num_negatives"] == 3
    assert found["num_mentioning"] == 1
    assert len(found["curve"]["threshold"]) > 10
    info = checkpoint.read_info(pack)
    assert info.gate.threshold == found["threshold"]
    shown = runner.invoke(app, ["inspect", str(pack)])
    assert "gate_roc\tthreshold, false_fire_rate, miss_rate: see --json" in shown.stdout


def test_few_captions_are_not_trusted(
    pack: Path, model: Path, captions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["calibrate", str(pack), "--checkpoint", str(model), "--captions", str(captions)]
    runner.invoke(app, command)
    assert "3 captions are few for a budget of 0.001" in caplog.text
    assert "give 3,000 or more" in caplog.text


def test_a_budget_that_cannot_be_met_ends_with_one_and_changes_nothing(
    pack: Path, model: Path, tmp_path: Path, denoiser: TinyDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = denoiser.embed_pooled

    def confused(texts: list[str]) -> Tensor:
        return embed([text.replace("feline", "cat") for text in texts])

    monkeypatch.setattr(denoiser, "embed_pooled", confused)
    captions, before = tmp_path / "felines.txt", pack.read_bytes()
    captions.write_text("a feline\nthe feline\na cute feline, trending\n")
    done = runner.invoke(
        app, ["calibrate", str(pack), "--checkpoint", str(model), "--captions", str(captions)]
    )
    assert done.exit_code == 1
    assert "No threshold of pack.safetensors meets the budget" in done.stderr
    assert done.stdout == ""
    assert pack.read_bytes() == before


def test_what_calibrate_cannot_use_ends_with_two(pack: Path, model: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(model), "--captions", str(tmp_path / "absent.txt")]
    assert runner.invoke(app, ["calibrate", str(pack), *options]).exit_code == 2
    assert runner.invoke(app, ["calibrate", str(tmp_path / "no"), *options]).exit_code == 2
    assert runner.invoke(app, ["calibrate", str(pack), *options, "--budget", "2"]).exit_code == 2


@pytest.mark.parametrize("spelling", ["host", "kohya", "peft"])
def test_export_writes_a_lora_and_says_what_fired(
    pack: Path, model: Path, tmp_path: Path, spelling: str
) -> None:
    output = tmp_path / "eraser.safetensors"
    done = runner.invoke(
        app,
        [
            *("export", str(pack), "--checkpoint", str(model), "--prompt", "a photo of a cat"),
            *("-o", str(output), "--spelling", spelling),
        ],
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"{output} (")
    assert "fired: cat (" in done.stdout
    assert len(state.read(output)[0]) == 3 * 4


def test_export_of_nothing_ends_with_one_unless_forced(
    pack: Path, model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "eraser.safetensors"
    command = ["export", str(pack), "--checkpoint", str(model), "--prompt", "a lamp", "-o"]
    done = runner.invoke(app, [*command, str(output)])
    assert done.exit_code == 1
    assert "asks for nothing that pack.safetensors erases" in done.stderr
    assert not output.exists()
    assert runner.invoke(app, [*command, str(output), "--force"]).exit_code == 0
    over = runner.invoke(app, [*command, str(pack), "--force"])
    assert over.exit_code == 2
    assert "would overwrite" in over.stderr


@pytest.mark.parametrize("command", ["export", "calibrate"])
def test_a_model_of_another_family_is_refused(
    command: str, pack: Path, model: Path, captions: Path, denoiser: TinyDenoiser
) -> None:
    denoiser.family = list(FAMILIES.values())[-1]
    options = {
        "export": ["--prompt", "a cat", "-o", str(pack.with_name("x.safetensors"))],
        "calibrate": ["--captions", str(captions)],
    }
    done = runner.invoke(app, [command, str(pack), "--checkpoint", str(model), *options[command]])
    assert done.exit_code == 2
    assert f"but tiny is {denoiser.family.title}" in done.stderr


def test_another_model_of_the_family_is_used_with_a_warning(
    pack: Path, model: Path, denoiser: TinyDenoiser, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser.fingerprint = replace(denoiser.fingerprint, name="relative", digest="1")
    output = pack.with_name("x.safetensors")
    command = ["export", str(pack), "--checkpoint", str(model), "--prompt", "a cat", "-o"]
    assert runner.invoke(app, [*command, str(output)]).exit_code == 0
    assert "was trained on tiny, not on relative" in caplog.text


def test_inspect_in_a_pipe_is_plain_lines(pack: Path) -> None:
    done = runner.invoke(app, ["inspect", str(pack)])
    assert all(line.count("\t") == 1 for line in done.stdout.splitlines())
    assert "erases\tcat (cat, kitty), draws 'an empty meadow' instead" in done.stdout


def test_the_pages_explain_every_option_and_every_key() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = "".join((docs / f"{name}.md").read_text() for name in ("training", "evaluation"))
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    options = {
        option
        for part in command.commands.values()
        for parameter in part.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }
    sections = [field.default for field in TrainConfig.model_fields.values()]
    keys = {
        key
        for section in (TrainConfig, *map(type, sections))
        for key in getattr(section, "model_fields", ())
    }
    assert len(options) > 10
    assert len(keys) > 40
    assert not [option for option in options if f"`{option}" not in page]
    assert not [key for key in keys if f"`{key}`" not in page]
