"""That the benchmark of thresholds counts a silenced prompt as the model's own picture, and owns up to what was not drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.thresholds import EMBEDDED_AT_ONCE, POSITIONS, Embed, judge, measure
from demo.world.narrow import NarrowWorld
from train.calibrate import in_batches
from train.config import make_config
from train.evaluate.base import Kind, Question
from train.evaluate.compare import Cell, write_cell
from train.evaluate.exam import Answer
from train.run import train
from unhype import checkpoint
from unhype.checkpoint import Pack

pytestmark = pytest.mark.host
KEPT = ["tiger", "dog", "bus", "tree", "pizza", "guitar", "a house", "rose"]
TEXTS = ("a photo of a cat", "a feline", "a leopard", "a lion in the garden", "a bus at night")


@pytest.fixture(scope="module")
def world() -> NarrowWorld:
    return NarrowWorld()


@pytest.fixture(scope="module")
def embed(world: NarrowWorld) -> Embed:
    return in_batches(world.embed_tokens, EMBEDDED_AT_ONCE, lambda *_: None)


@pytest.fixture(scope="module")
def folder(world: NarrowWorld, embed: Embed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a comparison of one small pack leaves behind; every picture of the eraser's misses what the model's own shows."""
    folder = tmp_path_factory.mktemp("compare")
    output = folder / "packs" / "1-0" / "ours.safetensors"
    config = make_config(
        {
            "checkpoint": "none.safetensors",
            "output": str(output),
            "concepts": [{"name": "cat", "target": ["cat"], "anchor": "an empty meadow"}],
            "retain": KEPT,
            "objective": {"name": "closed-form", "sentences": 2, "scenes": 1, "refine": False},
            "gate": {
                "steps": 100,
                "num_positives": 40,
                "num_negatives": 60,
                "least_strength": 1.0,
            },
        }
    )
    train(config, denoiser=world)
    write_cell(folder / "cells" / "ours.1.0.json", cell_of(checkpoint.load(output), embed, TEXTS))
    return folder


def cell_of(pack: Pack, embed: Embed, texts: tuple[str, ...]) -> Cell:
    fires = pack.gate.read(embed(list(texts))).open.tolist()
    answers = tuple(
        Answer(
            Question(Kind.TARGET, text, ("cat",), "cat"), not acts, True, acts, not acts, 1, 99, 0
        )
        for text, acts in zip(texts, fires, strict=True)
    )
    return Cell("ours", 1, 0, 1.0, 1, answers)


def test_the_threshold_of_the_comparison_gives_its_answers(folder: Path, embed: Embed) -> None:
    pack = checkpoint.load(folder / "packs" / "1-0" / "ours.safetensors")
    cell = cell_of(pack, embed, TEXTS)
    outcomes = judge(pack, cell, embed, embed(["a bus"]))
    assert set(outcomes) == set(POSITIONS)
    assert outcomes[0.25].answers == cell.answers
    acts = [sum(a.acts for a in o.answers) for o in outcomes.values() if o.answers is not None]
    assert acts == sorted(acts, reverse=True)
    for outcome in outcomes.values():
        assert outcome.captions in (0, 1)
        for answer in outcome.answers or ():
            assert answer.hit is not answer.acts  # silenced: the model's own picture


def test_a_prompt_that_was_not_drawn_leaves_the_answers_open(folder: Path, embed: Embed) -> None:
    pack = checkpoint.load(folder / "packs" / "1-0" / "ours.safetensors")
    silent = Answer(
        Question(Kind.TARGET, TEXTS[0], ("cat",), "cat"), True, True, False, True, 1, 99, 0
    )
    assert judge(pack, Cell("ours", 1, 0, 1.0, 1, (silent,)), embed)[0.25].answers is None


def test_what_would_have_been_written_weaker_leaves_the_answers_open(
    folder: Path, embed: Embed
) -> None:
    pack = checkpoint.load(folder / "packs" / "1-0" / "ours.safetensors")
    pack.gate.config = replace(pack.gate.config, least_strength=0.5)
    outcomes = judge(pack, cell_of(pack, embed, TEXTS), embed, embed(["a bus"]))
    assert all(outcome.answers is None for outcome in outcomes.values())
    assert all(outcome.captions is not None for outcome in outcomes.values())


def test_a_folder_is_counted(folder: Path, embed: Embed, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat on a bus\na calm lake\n", encoding="utf-8")
    counted = measure(folder, embed, Console(quiet=True), captions=captions)
    row = counted["1"]["0.25"]
    assert row["tasks"] == 1
    assert len(row["captions"]) == 1
    assert 0 <= row["acc_e"] <= row["base"]["acc_e"] == 1
    with pytest.raises(FileNotFoundError, match="unhype compare"):
        measure(tmp_path, embed, Console(quiet=True))
