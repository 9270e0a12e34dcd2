"""``unhype eval`` of a pack in the checkpoint that ComfyUI loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from demo.world.bench import DemoWorld, evaluator
from train.cli import app
from train.evaluate.base import Kind
from train.evaluate.evaluation import Effort, Subject, evaluate
from train.evaluate.suite import Suite, SuiteError, ask_world
from unhype import checkpoint as packs
from unhype.host.denoise import Denoiser, ModelFiles

from .conftest import MakePack

SUITE = """
things:
  cat: {synonyms: [feline], siblings: [tiger]}
  tiger: {}
  bus: {}
templates: ["my favourite {}"]
scenes: ["a {} next to a {}"]
plain: ["an empty beach"]
sampling: {steps: 3, guidance_scale: 3, size: 64, batch_size: 8}
seeds: 1
"""
CAT, OTHER = "my favourite cat", "my favourite bus"
runner = CliRunner()


@pytest.fixture
def pack(make_pack: MakePack, tmp_path: Path) -> Path:
    """A pack of random LoRA whose gate tells the two prompts apart."""
    make_pack(fires=(CAT, OTHER), folder=tmp_path)
    return tmp_path / "pack.safetensors"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SUITE, encoding="utf-8")
    return path


def test_the_command_draws_judges_and_reports(
    pack: Path, suite: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.cli.find_evaluator", lambda spec, labels: evaluator("", labels))
    command = ["eval", str(pack), "--checkpoint", str(checkpoint), "--suite", str(suite)]
    command += ["--evaluator", "demo-world", "--json", "--out", str(tmp_path / "out")]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    shares = {row["kind"]: row["share"]["value"] for row in report["fires"]}
    assert shares[Kind.TARGET.value] == 1.0
    assert shares[Kind.UNRELATED.value] == 0.0
    kept = {row["of"]: row for row in report["fidelity"]}
    assert kept[Kind.UNRELATED.value]["identical"]["value"] == 1.0
    assert not report["held_out"]["checked"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "does not say what it was trained on" in page
    assert page.count("data:image/png") == 2 * 7


def test_a_prompt_of_two_chunks_is_left_to_the_guard(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = Denoiser.load(ModelFiles(checkpoint), pictures=True)
    subject = Subject(pack, packs.load(pack), model, evaluator(), "demo-world")
    things = {"cat": {}, "bus": {}}
    long = Suite.model_validate(
        {"things": things, "templates": ["my {}"], "long": ["a quiet day, " * 40 + "with a {}"]}
    )
    asked = long.assignment("long", subject.pack.info)
    with pytest.raises(SuiteError, match=r"longer than the 77 tokens.*docs/guard\.md"):
        evaluate(subject, asked, tmp_path, report=lambda event: None)


@pytest.mark.slow
def test_the_demo_world_asks_and_attacks_a_pack_of_its_checkpoint(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    model = Denoiser.load(ModelFiles(checkpoint), pictures=True)
    subject = Subject(pack, packs.load(pack), model, evaluator(), "demo-world")
    world = DemoWorld()
    asked = ask_world(world, subject.pack.info, 1)
    few = [q for q in asked.questions if q.kind in (Kind.TARGET, Kind.SIBLING)][:3]
    few += [q for q in asked.questions if q.kind is Kind.UNRELATED][:1]
    asked = replace(
        asked, questions=tuple(few), sampling=replace(asked.sampling, steps=2, batch_size=8)
    )
    found = evaluate(
        subject, asked, tmp_path, attacks=Effort(1, 8, 1, 1), report=lambda event: None
    )
    names = [attack.name for attack in found.attacks]
    assert names[0] == "none"
    assert sum(attack.share is not None for attack in found.attacks) == 5
    assert any("gradient" in name for name in names)
    assert all(torch.isfinite(torch.tensor(attack.erased)) for attack in found.attacks)
