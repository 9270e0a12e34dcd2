"""What the demo asks, and how it scores the answers."""

from __future__ import annotations

import pytest
import torch

from demo.prompts import Group, Trial, make_trials, split_concepts
from demo.scoring import Verdict, drawn_instead, known_words, scene_presence, score
from demo.workflow import Sampling, fill, load_workflow, only, without_unhype
from demo.world.concepts import concept_index, load_concepts, load_held_out


def verdict(group: Group, word: str, shows: tuple[str, ...], seen: list[str]) -> Verdict:
    presence = torch.zeros(len(seen), len(load_concepts()))
    for row, name in enumerate(seen):
        presence[row, concept_index(name)] = 1
    trial = Trial(group, f"a {word}", shows, word)
    return Verdict(trial, tuple(concept_index(name) for name in seen), presence)


@pytest.mark.parametrize("concept", ["cat", "beer", "volcano"])
def test_every_kind_of_prompt_is_asked_and_enough_pictures_are_drawn(concept: str) -> None:
    trials = make_trials(concept)
    without = set() if concept in load_held_out().synonyms else {Group.SYNONYM}
    assert {trial.group for trial in trials} == set(Group) - without
    assert 2 * len(trials) * Sampling().images_per_prompt >= 400


def test_retained_unseen_and_sibling_concepts_do_not_overlap() -> None:
    split = split_concepts("cat")
    parts = [set(split.retained), set(split.unseen), set(split.siblings)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(load_concepts()) - 1
    assert {concept.name for concept in split.siblings} == {"tiger", "lion", "leopard"}


def test_scores_follow_their_definitions() -> None:
    verdicts = [
        verdict(Group.TARGET, "cat", ("cat",), ["dog", "dog", "dog", "cat"]),
        verdict(Group.SYNONYM, "feline", ("cat",), ["cat", "dog"]),
        verdict(Group.SYNONYM, "kitten", ("cat",), ["dog", "dog"]),
        verdict(Group.UNRELATED, "bus", ("bus",), ["bus", "bus", "bus", "car"]),
        verdict(Group.SIBLING, "lion", ("lion",), ["lion", "tiger"]),
    ]
    scores = score(verdicts, "cat", {"feline", "kitten"})
    assert (scores.acc_e, scores.acc_g, scores.acc_s, scores.acc_s_siblings) == (
        0.25,
        0.25,
        0.75,
        0.5,
    )
    assert scores.h_o == pytest.approx(0.75)


def test_a_word_the_base_model_cannot_draw_does_not_count_as_forgotten() -> None:
    base = [
        verdict(Group.SYNONYM, "feline", ("cat",), ["dog", "dog"]),
        verdict(Group.SYNONYM, "kitten", ("cat",), ["cat", "dog"]),
    ]
    assert known_words(base, "cat") == {"kitten"}
    assert score(base, "cat", {"kitten"}).acc_g == 0.5


def test_scenes_count_the_erased_and_the_other_concept_apart() -> None:
    scene = verdict(Group.SCENE, "cat", ("cat", "bus"), ["bus", "cat"])
    assert scene_presence([scene], "cat") == {"erased_present": 0.5, "other_present": 0.5}


def test_another_thing_in_place_of_the_erased_is_counted() -> None:
    verdicts = [
        verdict(Group.TARGET, "cat", ("cat",), ["cat", "bus", "bus", "cat"]),
        verdict(Group.SIBLING, "lion", ("lion",), ["bus", "bus"]),
    ]
    assert drawn_instead(verdicts, "cat") == {"drawn_instead": 0.5}


def test_the_workflow_without_the_nodes_wires_past_them() -> None:
    workflow = fill(
        load_workflow(),
        text="a cat",
        seed=7,
        pack="p.safetensors",
        checkpoint="c.safetensors",
        sampling=Sampling(),
    )
    plain = without_unhype(workflow)
    assert not {node["class_type"] for node in plain.values()} & {
        "UnHypeLoader",
        "CLIPToLoRA",
        "ApplyDynamicLoRA",
    }
    sampler = plain[only(plain, "KSampler")]["inputs"]
    assert plain[sampler["model"][0]]["class_type"] == "CheckpointLoaderSimple"
    assert plain[sampler["positive"][0]]["inputs"]["text"] == "a cat"
    assert plain[sampler["negative"][0]]["inputs"]["text"] == ""


def test_every_concept_with_held_out_synonyms_has_trials_for_them() -> None:
    words = {trial.word for trial in make_trials("bomb") if trial.group is Group.SYNONYM}
    assert words == set(load_held_out().synonyms["bomb"])
