"""Methods on the demo world at its own width: the real code in a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.world.bench import DemoWorld, assign, make_questions
from demo.world.concepts import load_held_out, siblings_of
from demo.world.narrow import NarrowWorld
from train.config import ConfigError, TrainConfig
from train.evaluate.base import Kind, Sampling, Task
from train.evaluate.baselines import edit_closed_form
from train.evaluate.compare import compare, read_cell
from train.evaluate.erasers import NoEraser, SimilarityEraser, StaticEraser
from train.evaluate.exam import Sheet, draw_sheet, mark
from train.evaluate.methods import METHODS, Workshop
from train.phrases import forms, normal
from unhype.lora import LoRAFactors

pytestmark = pytest.mark.host
SHORT = Sampling(steps=2, guidance_scale=3.0, size=64)


def shorten(config: TrainConfig) -> TrainConfig:
    """The same run in a few steps."""
    return config.model_copy(
        update={
            "gate": config.gate.model_copy(
                update={"steps": 20, "num_positives": 40, "num_negatives": 60}
            ),
            "trajectories": config.trajectories.model_copy(
                update={"rollouts": 4, "steps": 3, "states": 2}
            ),
            "train": config.train.model_copy(update={"steps": 2, "batch_size": 2}),
            "discovery": config.discovery.model_copy(update={"candidates": 2}),
        }
    )


class ShortWorld(DemoWorld):
    """The demo world with few questions and short trainings."""

    sampling = SHORT

    def task(self, num_concepts: int, seed: int) -> Task:
        task = super().task(num_concepts, seed)
        few = {kind: [q for q in task.questions if q.kind is kind][:1] for kind in Kind}
        return Task(shorten(task.config), tuple(q for questions in few.values() for q in questions))


@pytest.fixture(scope="module")
def model() -> NarrowWorld:
    return NarrowWorld()


@pytest.mark.parametrize("num", [1, 4, 16, 64])
def test_training_sees_no_word_that_is_asked_for(num: int) -> None:
    for seed in range(3):
        roles, task = assign(num, seed), DemoWorld().task(num, seed)
        config = task.config
        asked = {c.name for c in (*roles.siblings, *roles.unrelated)}
        held = {word for words in load_held_out().synonyms.values() for word in words}
        told = (*config.retain, *[p for c in config.concepts for p in c.target])
        assert not {form for text in told for form in forms(text)} & asked
        assert not {normal(text) for text in told} & held
        assert len(roles.erased) == num
        assert all(set(siblings_of(c.name)) - {e.name for e in roles.erased} for c in roles.erased)


def test_a_kind_of_what_is_erased_is_neither_kept_nor_asked_for() -> None:
    roles = assign(16, 1)
    assert "car" in {concept.name for concept in roles.erased}
    assert {concept.name for concept in roles.kinds} >= {"racing car"}
    config = DemoWorld().task(16, 1).config
    words = {question.word for question in make_questions(roles, 1)}
    for concept in roles.kinds:
        assert concept.kind_of in {erased.name for erased in roles.erased}
        assert not {concept.name, *concept.synonyms} & {*words, *config.retain}


def test_questions_have_every_kind() -> None:
    kinds = {question.kind for question in make_questions(assign(16, 0), 0)}
    assert kinds == set(Kind)


def test_sheet_asks_few_questions_with_more_seeds() -> None:
    questions = make_questions(assign(1, 0), 0)
    sheet = Sheet.of(questions, 100)
    targets = [q for q in sheet.questions if q.kind is Kind.TARGET]
    assert len(targets) > len({q.text for q in targets})
    assert sheet.seeds == tuple(range(100, 100 + len(sheet)))


def test_untouched_pictures_are_the_models_own(model: NarrowWorld) -> None:
    world = ShortWorld()
    sheet = Sheet.of(world.task(1, 0).questions, 7, pictures=1)
    evaluator = world.evaluator()
    base = draw_sheet(sheet, model, evaluator, NoEraser(), SHORT)
    again = draw_sheet(sheet, model, evaluator, NoEraser(), SHORT)
    assert torch.equal(base.pictures, again.pictures)
    answers = mark(
        sheet, evaluator, base, draw_sheet(sheet, model, evaluator, NoEraser(), SHORT, base=base)
    )
    assert all(a.identical and a.hit == a.base_hit and not a.acts for a in answers)


def test_closed_form_sends_erased_text_to_the_anchors_output(model: NarrowWorld) -> None:
    config = DemoWorld().task(1, 1).config
    eraser = edit_closed_form(config, model)
    name, anchor = config.concepts[0].name, config.concepts[0].anchor
    text = model.embed([f"a photo of a {name}", f"a photo of {anchor}", "a photo of a pizza"])
    weight, delta = model.target_weights()[1], eraser.factors.delta(1)[0]
    erased, wanted, other = text.pooled
    before = (weight @ erased - weight @ wanted).norm()
    after = ((weight + delta) @ erased - weight @ wanted).norm()
    assert after < 0.5 * before
    assert (delta @ other).norm() < 0.3 * (weight @ other).norm()


def test_similarity_is_silent_far_from_its_concept(model: NarrowWorld) -> None:
    lora = LoRAFactors(
        model.targets,
        tuple(torch.randn(2, 1, t.in_features) for t in model.targets),
        tuple(torch.randn(2, t.out_features, 1) for t in model.targets),
        torch.ones(2),
    )
    phrases = model.embed_pooled(["a photo of a cat", "a photo of a pizza"])
    center = model.embed_pooled(["a quiet street", "a tree", "a car", "old books"]).mean(0)
    eraser = SimilarityEraser(lora, phrases, torch.tensor([0, 1]), center)
    written = eraser.write(model.embed_pooled(["a photo of a cat", "a wooden table"]))
    assert written.acts.tolist() == [True, False]
    strength = eraser.strength(phrases)
    assert strength[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert strength[0, 0] > strength[0, 1]


def test_every_method_runs_and_is_kept(tmp_path: Path) -> None:
    world, stages = ShortWorld(), []
    arguments = {"methods": list(METHODS), "sizes": [2], "seeds": [0], "folder": tmp_path}
    rows = compare(world, **arguments, report=lambda event: stages.append(event.stage))
    assert [row.method for row in rows] == list(METHODS)
    none = rows[0]
    assert none.figures.identical == 1.0
    assert none.attack_50 == none.base_attack_50
    assert all(row.train_seconds > 0 and row.pack_bytes > 0 for row in rows[1:])
    stages.clear()
    assert compare(world, **arguments, report=lambda event: stages.append(event.stage)) == rows
    assert stages == []
    cell = read_cell(next((tmp_path / "cells").glob("ours.*.json")))
    assert cell.method == "ours"


def test_unknown_methods_and_sizes_are_refused(tmp_path: Path) -> None:
    def run(methods: list[str], sizes: list[int]) -> None:
        compare(
            ShortWorld(),
            methods=methods,
            sizes=sizes,
            seeds=[0],
            folder=tmp_path,
            report=lambda _: None,
        )

    with pytest.raises(ConfigError, match="no method 'magic'"):
        run(["magic"], [1])
    with pytest.raises(ConfigError, match="1 to 64 concepts, got 65"):
        run(["none"], [65])


def test_static_methods_share_trajectories(model: NarrowWorld, tmp_path: Path) -> None:
    shop = Workshop(ShortWorld().task(1, 0).config, model, tmp_path, lambda _: None)
    trained = METHODS["static"](shop)
    assert isinstance(trained.eraser, StaticEraser)
    collected = dict(shop.collect_seconds)
    METHODS["similarity-gated"](shop)
    assert shop.collect_seconds == collected
