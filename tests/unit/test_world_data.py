"""What is held out of the world stays out of everything that training reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from demo.prompts import make_trials, split_concepts
from demo.run import OBJECTIVES, make_config
from demo.world.art import sample_scene
from demo.world.captions import write_caption
from demo.world.concepts import concept_index, load_concepts, load_held_out, siblings_of
from demo.world.words import touches_held_out
from train.config import DATA, TrainConfig, read_lines
from unhype.hypernetwork import Architecture


def test_names_and_synonyms_are_nobodys_twice() -> None:
    words = [word for concept in load_concepts() for word in (concept.name, *concept.synonyms)]
    words += [word for group in load_held_out().synonyms.values() for word in group]
    assert not [word for word, count in Counter(words).items() if count > 1]


def test_there_are_at_least_a_hundred_concepts_with_siblings() -> None:
    assert len(load_concepts()) >= 100
    assert all(siblings_of(concept.name) for concept in load_concepts())


def test_a_kind_is_of_another_concept() -> None:
    names = {concept.name for concept in load_concepts()}
    kinds = [concept for concept in load_concepts() if concept.kind_of]
    assert all(concept.kind_of in names - {concept.name} for concept in kinds)


def test_no_caption_holds_a_held_out_word() -> None:
    rng = np.random.default_rng(0)
    captions = [write_caption(sample_scene(rng), rng) for _ in range(5000)]
    assert not [caption for caption in captions if touches_held_out(caption)]


@pytest.mark.parametrize("name", ["templates.txt", "captions.txt"])
def test_nothing_the_training_ships_holds_a_held_out_word(name: str) -> None:
    assert not [line for line in read_lines(DATA / name) if touches_held_out(line)]


def test_inflections_of_a_held_out_word_count_as_held_out() -> None:
    assert touches_held_out("two kittens")
    assert touches_held_out("a tiny house")
    assert not touches_held_out("a photo of a cat")


@pytest.mark.parametrize("concept", ["cat", "beer", "ambulance"])
def test_the_demo_trains_on_nothing_it_evaluates(concept: str, tmp_path: Path) -> None:
    paths = (tmp_path / "world.safetensors", tmp_path / "pack.safetensors")
    config = make_config(concept, *paths, OBJECTIVES[0])
    split = split_concepts(concept)
    evaluated = {c.name for c in (*split.unseen, *split.siblings)}
    seen = {*config.retain, *(phrase for entry in config.concepts for phrase in entry.target)}
    assert not seen & evaluated
    assert not [text for text in (*seen, *config.retain_captions) if touches_held_out(text)]
    trial_words = {trial.word for trial in make_trials(concept)} - {concept, ""}
    assert not trial_words & seen


def test_the_demo_can_be_solved_in_closed_form(tmp_path: Path) -> None:
    paths = (tmp_path / "world.safetensors", tmp_path / "pack.safetensors")
    solved, trained = (make_config("cat", *paths, objective) for objective in OBJECTIVES)
    assert trained.network.architecture is Architecture.ATOMS
    assert solved.network.architecture is Architecture.EDITS
    assert (solved.retain, solved.concepts) == (trained.retain, trained.concepts)
    assert TrainConfig.model_validate(solved.model_dump()) == solved


def test_an_unknown_concept_is_answered_with_close_ones() -> None:
    with pytest.raises(ValueError, match=r"no concept 'kat'.*cat"):
        concept_index("kat")
