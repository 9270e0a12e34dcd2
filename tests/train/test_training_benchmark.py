"""The benchmark of training: what it draws, when it stops, and what it makes of what it measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.authors import RECIPES, AuthorsLoop, steps_before, time_range
from benchmarks.training import (
    Checkpoint,
    Goal,
    Plan,
    choose_pictures,
    compare,
    exam_times,
    nearest,
    read_cost,
    relate,
)
from demo.world.bench import DemoWorld
from demo.world.concepts import load_held_out
from demo.world.narrow import NarrowWorld
from train.evaluate.base import Kind
from train.evaluate.compare import Cell, write_cell

GOAL = Goal(acc_e=0.05, acc_s=0.9)


def at(seconds: float, acc_e: float = 0.0, acc_s: float = 1.0, steps: int = 1) -> Checkpoint:
    return Checkpoint(seconds, steps, acc_e, acc_s)


def test_the_authors_states_lie_anywhere_but_at_the_very_end() -> None:
    assert [steps_before(i) for i in (49, 25, 1, 0)] == [1, 25, 49, 49]


def test_the_authors_times_begin_too_early() -> None:
    assert time_range(0) == (0, 19)
    assert time_range(25) == (50, 519)
    assert time_range(49) == (98, 999)


def test_the_goal_wants_both_figures() -> None:
    assert GOAL.shortfall(at(1, 0.05, 0.9)) == 0
    assert GOAL.shortfall(at(1, 0.15, 0.8)) == pytest.approx(0.2)


def test_the_recipe_nearest_to_the_goal_goes_on() -> None:
    curves = {"slow": [at(1, 0.0), at(2, 0.5)], "fast": [at(1, 1.0), at(2, 0.2)]}
    assert nearest(curves, GOAL) == "fast"


def test_exams_come_early_first_and_end_at_the_limit() -> None:
    assert exam_times(Plan(limit=100, every=40)) == [5, 10, 15, 20, 40, 80, 100]
    assert exam_times(Plan(limit=80, every=40)) == [5, 10, 15, 20, 40, 80]
    assert exam_times(Plan(limit=4, every=8)) == [1, 2, 3, 4]


def test_the_ratio_is_of_the_first_of_both_at_the_goal() -> None:
    ours = [at(10, 0.5, steps=40), at(20, steps=80), at(30, steps=150)]
    authors = {"objects": [at(50, 0.5), at(100)], "celebrities": [at(50, 0.9)]}
    found = compare(ours, authors, GOAL, limit=900)
    assert (found["ours_seconds"], found["ours_steps"]) == (20, 80)
    assert (found["authors_seconds"], found["authors_recipe"]) == (100, "objects")
    assert found["authors_over_ours_time"] == 5
    assert not found["is_lower_bound"]


def test_a_loop_that_does_not_arrive_gives_a_lower_bound() -> None:
    authors = {"objects": [at(60, 0.5)], "celebrities": [at(60, 0.9), at(900, 0.1)]}
    found = compare([at(10)], authors, GOAL, limit=900)
    assert found["authors_over_ours_time"] == 90
    assert found["is_lower_bound"]
    assert not found["authors_reached"]
    assert found["authors_recipe"] == "celebrities"


def test_without_a_run_of_ours_at_the_goal_there_is_no_ratio() -> None:
    found = compare([at(10, 0.5)], {"objects": [at(60)]}, GOAL, limit=900)
    assert found["authors_over_ours_time"] is None
    assert found["authors_reached"]


def test_an_exam_asks_what_no_training_saw() -> None:
    task = DemoWorld().task(1, 0)
    plan = Plan(targets=10, unrelated=7)
    sheet = choose_pictures(task.questions, plan)
    assert Counter(q.kind for q in sheet.questions) == {Kind.TARGET: 10, Kind.UNRELATED: 7}
    assert len(set(sheet.seeds)) == len(sheet)
    unseen = load_held_out().templates
    asked = {q.text for q in sheet.questions if q.kind is Kind.TARGET}
    assert asked == {t.format(task.config.concepts[0].name) for t in unseen}
    assert not set(unseen) & set(task.config.templates)


def test_cost_is_relative_to_one_concept() -> None:
    assert relate({1: (20.0, 5), 4: (50.0, 6)})["4"] == {
        "seconds": 50.0,
        "bytes": 6,
        "over_one": 2.5,
    }
    assert relate({4: (50.0, 6)})["4"]["over_one"] is None


def test_cost_is_read_from_a_comparison(tmp_path: Path) -> None:
    for concepts, seed, seconds, size in ((1, 0, 10.0, 100), (1, 1, 30.0, 102), (16, 0, 60.0, 200)):
        cell = Cell("ours", concepts, seed, seconds, size, ())
        write_cell(tmp_path / "cells" / f"ours.{concepts}.{seed}.json", cell)
    write_cell(tmp_path / "cells" / "static.1.0.json", Cell("static", 1, 0, 1.0, 1, ()))
    cost = read_cost(tmp_path)
    assert cost == {
        "1": {"seconds": 20.0, "bytes": 101, "over_one": 1.0},
        "16": {"seconds": 60.0, "bytes": 200, "over_one": 3.0},
    }


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="unhype compare"):
        read_cost(tmp_path)


def test_the_authors_loop_learns_to_write_and_acts_on_every_prompt() -> None:
    model, config = NarrowWorld(), DemoWorld().task(1, 0).config
    shorter = config.model_copy(
        update={"retain": config.retain[:3], "templates": (config.templates[0], "{} and {}")}
    )
    loop = AuthorsLoop(shorter, model, RECIPES["objects"])
    pooled = model.embed_pooled(["a cactus", "a boat"])
    assert torch.equal(before := norm(loop, pooled), torch.zeros(2)), before
    loop.run(loop.seconds + 0.01)
    assert loop.steps == 1
    assert (norm(loop, pooled) > 0).all()


def norm(loop: AuthorsLoop, pooled: torch.Tensor) -> torch.Tensor:
    written = loop.eraser.write(pooled)
    assert written.acts.all()
    assert written.factors is not None
    return written.factors.squared_norm()
