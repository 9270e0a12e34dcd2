"""Edits in closed form on the demo world: what they do to states, what they leave, and what is refused."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from demo.world.narrow import NarrowWorld
from train import closed_form
from train.closed_form import texts_to_read
from train.config import ConfigError, ObjectiveName, TrainConfig, make_config
from train.extend import Extended, extend, fitting, remove
from train.loop import STAGE
from train.objectives.refinement import change_of_kept
from train.plan import estimate
from train.run import Event, TrainingInterrupted, train
from unhype import checkpoint
from unhype.hypernetwork import EditsHypernetwork
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
            "objective": {
                "name": "closed-form",
                "sentences": 4,
                "scenes": 2,
                "refine": False,
                **objective,
            },
            "gate": {"steps": 100, "num_positives": 80, "num_negatives": 120},
            "trajectories": {"size": 64, "rollouts": 8, "states": 4, "steps": 8},
            "train": {"steps": 40, "save_every": 5},
        }
    )


@pytest.fixture(scope="module")
def pack(world: NarrowWorld, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Pack:
    output = tmp_path_factory.mktemp("pack") / "pack.safetensors"
    return checkpoint.load(train(config(output), denoiser=world).path)


@pytest.fixture(scope="module")
def refined(world: NarrowWorld, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Pack:
    output = tmp_path_factory.mktemp("refined") / "pack.safetensors"
    return checkpoint.load(train(config(output, refine=True), denoiser=world).path)


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


@pytest.fixture(scope="module")
def extended(
    world: NarrowWorld, pack: checkpoint.Pack, tmp_path_factory: pytest.TempPathFactory
) -> Extended:
    """The same pack with pizza, and with guitars."""
    folder = tmp_path_factory.mktemp("extended")
    old = folder / "old.safetensors"
    checkpoint.save(old, pack.info, pack.hypernetwork, pack.gate)
    new = config(folder / "new.safetensors").plain()
    concepts = [
        {"name": name, "target": [name], "anchor": "an empty meadow"}
        for name in ("pizza", "guitar")
    ]
    retain = ["tiger", "dog", "bus", "tree", "a house", "rose"]
    return extend(old, make_config({**new, "concepts": concepts, "retain": retain}), denoiser=world)


def test_an_extended_pack_still_does_the_same_for_its_old_concepts(
    world: NarrowWorld, pack: checkpoint.Pack, extended: Extended
) -> None:
    new = checkpoint.load(extended.path)
    assert new.info.concept_names == ("cat", "bomb", "pizza", "guitar")
    assert new.info.hypernetwork.num_concepts == 4
    assert max(change.mean for change in extended.changes.values()) < 0.02
    assert extended.gate_difference < 1e-5
    embedding = world.embed_pooled(["here is a kitty"])
    before, after = (p.hypernetwork.generate(embedding).delta(0) for p in (pack, new))
    assert (after - before).norm() < 0.02 * before.norm()


def test_an_extended_pack_erases_the_new_too(world: NarrowWorld, extended: Extended) -> None:
    new = checkpoint.load(extended.path)
    for target in ("pizza", "guitar"):
        text = f"a photo of a {target}"
        embedding = world.embed_pooled([text])
        assert new.gate.read(embedding).fired[0].nonzero().flatten().tolist() == [
            new.info.concept_names.index(target)
        ]
        wanted = outputs(world, "a photo of an empty meadow")[-1]
        plain = outputs(world, text)[-1]
        edited = outputs(world, text, new.hypernetwork.generate(embedding))[-1]
        assert (edited - wanted).norm() < 0.35 * (plain - wanted).norm()


def test_an_extended_pack_can_be_extended_again_and_its_settings_default_to_its_own(
    world: NarrowWorld, extended: Extended, tmp_path: Path
) -> None:
    plain = config(tmp_path / "again.safetensors").plain()
    data = {key: plain[key] for key in ("checkpoint", "output", "retain")}
    rose = [{"name": "rose", "target": ["rose"], "anchor": "an empty meadow"}]
    data |= {"concepts": rose, "retain": ["tiger", "dog", "bus", "tree", "a house"]}
    settings = fitting(checkpoint.load(extended.path), make_config(data))
    assert settings.objective.name is ObjectiveName.CLOSED_FORM
    gate = settings.gate.model_copy(update={"steps": 100, "num_positives": 40})
    assert settings.objective.refine
    objective = settings.objective.model_copy(update={"refine": False})
    settings = settings.model_copy(update={"gate": gate, "objective": objective})
    again = extend(extended.path, settings, denoiser=world)
    assert checkpoint.load(again.path).info.hypernetwork.num_concepts == 5
    assert max(change.mean for change in again.changes.values()) < 0.02


def test_a_removed_edit_is_gone_and_the_others_stay(
    world: NarrowWorld, extended: Extended, tmp_path: Path
) -> None:
    output = tmp_path / "less.safetensors"
    remove(extended.path, ["bomb", "pizza", "guitar"], output)
    before, after = checkpoint.load(extended.path), checkpoint.load(output)
    sizes = after.info.hypernetwork
    assert (sizes.num_concepts, sizes.directions) == (1, sizes.rank)  # no direction of the others
    embedding = world.embed_pooled(["a photo of a cat"])
    for index in range(len(after.info.targets)):
        old, new = (p.hypernetwork.generate(embedding).delta(index) for p in (before, after))
        assert (new - old).norm() < 0.02 * old.norm()
    two = tmp_path / "two.safetensors"
    remove(extended.path, ["cat", "guitar"], two)
    left = checkpoint.load(two)
    assert left.info.concept_names == ("bomb", "pizza")
    embedding = world.embed_pooled(["a photo of a pizza"])
    old, new = (p.hypernetwork.generate(embedding).delta(0) for p in (before, left))
    assert (new - old).norm() < 0.02 * old.norm()


def test_an_extension_of_edits_is_in_closed_form(pack: checkpoint.Pack, tmp_path: Path) -> None:
    plain = config(tmp_path / "none.safetensors").plain()
    rose = [{"name": "rose", "target": ["rose"], "anchor": "an empty meadow"}]
    data = {key: plain[key] for key in ("checkpoint", "output")} | {"concepts": rose}
    data |= {"retain": ["tiger", "dog"], "objective": {"name": "joint"}}
    with pytest.raises(ConfigError, match="is extended with closed-form"):
        fitting(pack, make_config(data))


def test_a_plan_of_closed_form_is_of_its_size_and_time(world: NarrowWorld, tmp_path: Path) -> None:
    settings = config(tmp_path / "planned.safetensors")
    planned = estimate(settings, world)
    result = train(settings, denoiser=world)
    assert planned.pack_bytes == pytest.approx(result.path.stat().st_size, abs=300)
    assert planned.pool_bytes == planned.state_bytes == 0
    assert all(seconds >= 0 for seconds in planned.seconds.values())
    assert planned.seconds["reading sentences"] > 0
    assert texts_to_read(settings) > texts_to_read(
        settings.model_copy(update={"concepts": settings.concepts[:1]})
    )


def test_refining_brings_predictions_nearer_to_the_anchors(
    world: NarrowWorld, refined: checkpoint.Pack, tmp_path: Path
) -> None:
    barely = config(tmp_path / "barely.safetensors", refine=True).plain()
    barely["train"] |= {"steps": 1, "lr": 1e-6}  # pyright: ignore[reportOperatorIssue]
    start = train(make_config(barely), denoiser=world).metrics["erase_loss"]
    end, without = (
        float(str(refined.info.metrics[key])) for key in ("erase_loss", "erase_loss_without")
    )
    assert start < 0.5 * without  # the solution erases already
    assert end < 0.7 * start


def test_refining_leaves_alone_what_tells_the_concepts_apart(
    pack: checkpoint.Pack, refined: checkpoint.Pack
) -> None:
    before, after = pack.hypernetwork.state_dict(), refined.hypernetwork.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"down", "mix", "up"}


def test_what_stays_is_held_while_edits_are_refined(
    world: NarrowWorld, refined: checkpoint.Pack, pack: checkpoint.Pack, tmp_path: Path
) -> None:
    output = tmp_path / "loose.safetensors"
    loose = checkpoint.load(train(config(output, refine=True, hold=0.0), denoiser=world).path)
    kept = closed_form.kept_gram(config(output), world).float()
    changes = []
    for one in (pack, refined, loose):
        assert isinstance(one.hypernetwork, EditsHypernetwork)
        with torch.no_grad():
            changes.append(float(change_of_kept(one.hypernetwork, kept)))
    solved, held, free = changes
    assert held < free
    assert held < 1.1 * solved


def test_the_change_of_what_stays_is_that_of_the_layers_outputs(
    world: NarrowWorld, pack: checkpoint.Pack
) -> None:
    r = world.embed(["a photo of a tiger"]).cross[0]
    network = pack.hypernetwork
    assert isinstance(network, EditsHypernetwork)
    with torch.no_grad():
        moved = [
            (r @ down.T @ mix.T @ up.T).square().sum(1).mean()
            for down, mix in zip(network.down, network.mix, strict=True)
            for up in network.up
        ]
        found = change_of_kept(network, r.T @ r / len(r))
    torch.testing.assert_close(found, torch.stack(moved).sum() / len(network.down))


def test_an_interrupted_refinement_goes_on_to_the_same_pack(
    world: NarrowWorld, refined: checkpoint.Pack, tmp_path: Path
) -> None:
    settings = config(tmp_path / "broken.safetensors", refine=True)

    def stop(event: Event) -> None:
        if event.stage == STAGE and event.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match="step 7 of 40"):
        train(settings, denoiser=world, progress=stop)
    whole = checkpoint.load(train(settings, denoiser=world).path)
    for name, value in refined.hypernetwork.state_dict().items():
        assert torch.equal(whole.hypernetwork.state_dict()[name], value), name
    assert whole.info.metrics == refined.info.metrics


def test_a_refined_pack_can_be_extended_and_its_old_edits_stay(
    world: NarrowWorld, refined: checkpoint.Pack, tmp_path: Path
) -> None:
    old = tmp_path / "old.safetensors"
    checkpoint.save(old, refined.info, refined.hypernetwork, refined.gate)
    data = config(tmp_path / "new.safetensors", refine=True).plain()
    data |= {"concepts": [{"name": "pizza", "target": ["pizza"], "anchor": "an empty meadow"}]}
    data |= {"retain": ["tiger", "dog", "bus", "tree", "a house", "rose"]}
    grown = extend(old, make_config(data), denoiser=world)
    assert max(change.mean for change in grown.changes.values()) < 0.02
    assert float(str(grown.metrics["erase_loss"])) < 0.3 * float(
        str(grown.metrics["erase_loss_without"])
    )
    new = checkpoint.load(grown.path)
    texts = ["a photo of a pizza", "a photo of an empty meadow"]
    wanted = outputs(world, texts[1])[-1]
    plain = outputs(world, texts[0])[-1]
    factors = new.hypernetwork.generate(world.embed_pooled(texts[:1]))
    assert (outputs(world, texts[0], factors)[-1] - wanted).norm() < 0.5 * (plain - wanted).norm()


def test_a_plan_of_refining_counts_trajectories_and_steps(
    world: NarrowWorld, tmp_path: Path
) -> None:
    settings = config(tmp_path / "planned.safetensors", refine=True)
    planned = estimate(settings, world)
    seconds = planned.seconds
    for part in ("reading sentences", "collecting trajectories", "training the hypernetwork"):
        assert seconds[part] > 0
    states = {}

    def look(event: Event) -> None:
        if event.stage == STAGE and event.step == 6:
            for kind in ("state", "pool"):
                states[kind] = settings.output.with_suffix(f".{kind}.safetensors").stat().st_size

    result = train(settings, denoiser=world, progress=look)
    assert planned.pack_bytes == pytest.approx(result.path.stat().st_size, abs=400)
    assert planned.pool_file_bytes == pytest.approx(states["pool"], rel=0.05)
    assert planned.state_bytes == pytest.approx(states["state"], rel=0.05)
