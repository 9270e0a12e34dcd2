"""Edits in closed form on the demo world: what they do to states, what they leave, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from demo.world.narrow import NarrowWorld
from train import closed_form
from train.config import ConfigError, TrainConfig, make_config
from train.extend import fitting
from train.run import train
from unhype import checkpoint
from unhype.lora import LoRAFactors

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def world() -> NarrowWorld:
    return NarrowWorld()


def config(output: Path, **objective: object) -> TrainConfig:
    return make_config(
        {
            "checkpoint": "none.safetensors",
            "output": str(output),
            "concepts": [
                {"name": "cat", "target": ["cat", "kitty"], "anchor": "an empty meadow"},
                {"name": "bomb", "target": ["bomb"], "anchor": "an empty meadow"},
            ],
            "retain": ["tiger", "dog", "bus", "tree", "pizza", "guitar", "a house", "rose"],
            "objective": {"name": "closed-form", "sentences": 4, "scenes": 2, **objective},
            "gate": {"steps": 100, "num_positives": 80, "num_negatives": 120},
        }
    )


@pytest.fixture(scope="module")
def pack(world: NarrowWorld, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Pack:
    output = tmp_path_factory.mktemp("pack") / "pack.safetensors"
    return checkpoint.load(train(config(output), denoiser=world).path)


def outputs(world: NarrowWorld, text: str, factors: LoRAFactors | None = None) -> torch.Tensor:
    """What all target modules make of a text's states, (77, out)."""
    states = world.embed([text]).cross[0]
    weights = list(world.target_weights())
    if factors is not None:
        weights = [w + factors.delta(index)[0] for index, w in enumerate(weights)]
    return torch.cat([states @ w.T for w in weights], dim=1)


def test_target_text_is_read_as_its_anchor(world: NarrowWorld, pack: checkpoint.Pack) -> None:
    for target in ("kitty", "bomb"):
        text = f"a photo of a {target}"
        factors = pack.hypernetwork.generate(world.embed_pooled([text]))
        wanted = outputs(world, "a photo of an empty meadow")[-1]
        plain, edited = outputs(world, text)[-1], outputs(world, text, factors)[-1]
        assert (edited - wanted).norm() < 0.35 * (plain - wanted).norm()


def test_kept_text_is_read_almost_as_before_even_with_the_edit(
    world: NarrowWorld, pack: checkpoint.Pack
) -> None:
    factors = pack.hypernetwork.generate(world.embed_pooled(["a photo of a cat"]))
    plain = outputs(world, "a photo of a tiger")[-1]
    anchor = outputs(world, "a photo of an empty meadow")[-1]
    moved = outputs(world, "a photo of a tiger", factors)[-1] - plain
    assert moved.norm() < 0.4 * (anchor - plain).norm()


def test_each_prompt_gets_its_own_concepts_edit(world: NarrowWorld, pack: checkpoint.Pack) -> None:
    both = world.embed_pooled(["a photo of a cat", "a photo of a bomb"])
    deltas = pack.hypernetwork.generate(both).delta(0)
    assert (deltas[0] - deltas[1]).norm() > 0.5 * deltas[0].norm()


def test_the_same_seed_gives_the_same_pack(world: NarrowWorld, tmp_path: Path) -> None:
    first, second = (
        checkpoint.load(train(config(tmp_path / f"{name}.safetensors"), denoiser=world).path)
        for name in "ab"
    )
    for one, other in zip(
        first.hypernetwork.parameters(), second.hypernetwork.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_words_are_found_where_they_stand(world: NarrowWorld) -> None:
    reader = closed_form._Texts(world)
    side = closed_form.Side("a tabby cat on a bus", "a tabby cat")
    ((_, word, end),) = reader.locate([side])
    assert end == int(world.token_embeddings([side.text]).ends[0])
    assert word == int(world.token_embeddings([side.beginning]).ends[0]) - 1
    ((_, word, _),) = reader.locate([closed_form.Side("two cats", "two cat")])
    assert word == 1  # "cats" is a token of its own: the last that both share


def test_a_phrase_is_found_where_it_was_put() -> None:
    side = closed_form._side("a postcard of a {} and a {}", "a bus", "car")
    assert side == closed_form.Side(
        "a postcard of a bus and a car", "a postcard of a bus and a car"
    )
    side = closed_form._side("a postcard of a {} and a {}", "car", after=("a bus",))
    assert side == closed_form.Side("a postcard of a car and a bus", "a postcard of a car")


def test_scenes_cut_where_the_phrase_ends(tmp_path: Path) -> None:
    settings, rng = config(tmp_path / "none.safetensors"), random.Random(0)
    for twin in closed_form._twins(
        settings, settings.concepts[0], closed_form._forms(settings, rng), rng
    ):
        for side, phrases in ((twin.target, ("cat", "kitty")), (twin.anchor, ("an empty meadow",))):
            assert side.beginning.endswith(phrases)
            assert side.text.startswith(side.beginning)


def test_edits_and_closed_form_need_one_another(tmp_path: Path) -> None:
    plain = config(tmp_path / "none.safetensors").plain()
    with pytest.raises(ConfigError, match="need one another"):
        make_config({**plain, "network": {"architecture": "atoms"}})
    with pytest.raises(ConfigError, match="belongs to closed-form, not to direct"):
        make_config({**plain, "objective": {"name": "direct", "preserve": 1.0}})


def test_edits_are_not_extended(pack: checkpoint.Pack, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Train all concepts anew"):
        fitting(pack, config(tmp_path / "none.safetensors"))
