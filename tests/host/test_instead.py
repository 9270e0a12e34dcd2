"""That the benchmark of what is drawn instead runs, and asks for the anchor in the target's place."""

from __future__ import annotations

import pytest
from rich.console import Console

from benchmarks.instead import REFINED, SOLVED, ask, measure
from demo.world.bench import DemoWorld
from train.config import TrainConfig

pytestmark = pytest.mark.host


def shorten(config: TrainConfig) -> TrainConfig:
    gate = {"steps": 60, "num_positives": 40, "num_negatives": 60}
    parts = {
        "gate": gate,
        "trajectories": {"rollouts": 4, "states": 2, "steps": 4},
        "train": {"steps": 10},
        "objective": {"sentences": 2, "scenes": 1, "preserved": 40},
    }
    return config.model_copy(
        update={n: getattr(config, n).model_copy(update=v) for n, v in parts.items()}
    )


def test_the_anchor_stands_where_the_target_stood() -> None:
    asked, meant = ask(DemoWorld().task(1, 0))
    pairs = {a.text: m.text for a, m in zip(asked.questions, meant.questions, strict=True)}
    assert pairs["a photo of a cactus"] == "a photo of an empty meadow"
    assert not [text for text in pairs.values() if "cactus" in text or "{}" in text]
    assert asked.seeds == meant.seeds


def test_both_kinds_of_edits_are_compared_with_the_anchors_pictures() -> None:
    figures = measure(DemoWorld(), (1,), Console(quiet=True), change=shorten)["1"]
    assert set(figures) == {SOLVED, REFINED}
    for of_pack in figures.values():
        assert of_pack["erased"] < 0.5
        assert 0 < of_pack["distance"] < 1
