"""The texts of a run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from train.config import DATA, TrainConfig, read_lines
from train.prompts import fill, forget_prompts, mentions, retain_prompts, split_vocabulary

Make = Callable[..., TrainConfig]
TWO_CONCEPTS = 'concepts=[{"name": "cat", "target": ["cat", "kitty"], "anchor": "an empty meadow"}, {"name": "car", "target": ["car"], "anchor": "a road"}]'


@pytest.mark.parametrize(
    ("template", "phrases", "text"),
    [
        ("a photo of a {}", ("cat",), "a photo of a cat"),
        ("a photo of a {}", ("owl",), "a photo of an owl"),
        ("a photo of a {}", ("an empty meadow",), "a photo of an empty meadow"),
        ("the {} and the {}", ("cat", "a road"), "the cat and a road"),
        ("a {} next to a {}", ("apple", "bus"), "an apple next to a bus"),
        ("{}, high detail", ("cat",), "cat, high detail"),
    ],
)
def test_a_phrase_gets_the_article_it_needs(
    template: str, phrases: tuple[str, ...], text: str
) -> None:
    assert fill(template, *phrases) == text


def test_mentions_are_of_whole_words() -> None:
    assert mentions("Two cats on a wall", ["cat"])
    assert mentions("an interview\nwith Robert  Downey Jr.", ["Robert Downey Jr."])
    assert mentions("two red buses", ["a red bus"])
    assert not mentions("a catalog", ["cat"])
    assert not mentions("a calm morning", [])


def test_every_forget_prompt_has_its_target_and_its_twin_the_anchor(make: Make) -> None:
    for prompt in forget_prompts(make(), 60, rng=random.Random(0)):
        assert mentions(prompt.text, ["cat", "kitty"])
        assert "empty meadow" in prompt.anchor
        assert not mentions(prompt.anchor, ["cat", "kitty"])


def test_concepts_and_phrases_have_equal_shares(make: Make) -> None:
    prompts = forget_prompts(make(TWO_CONCEPTS), 80, rng=random.Random(0))
    assert Counter(prompt.concept for prompt in prompts) == {0: 40, 1: 40}
    kitties = sum(mentions(prompt.text, ["kitty"]) for prompt in prompts)
    assert kitties == 20


@pytest.mark.parametrize(("num", "plain"), [(23, 0), (24, 2), (36, 3), (200, 3)])
def test_names_alone_come_first_where_there_is_room(make: Make, num: int, plain: int) -> None:
    config = make(TWO_CONCEPTS, "trajectories.scene_share=0.5")
    prompts = forget_prompts(config, num, rng=random.Random(0), plain_first=True)
    usual = forget_prompts(config, num, rng=random.Random(0))
    assert [prompt.concept for prompt in prompts] == [index % 2 for index in range(num)]
    assert all(prompt.anchor and prompt.anchor != prompt.text for prompt in prompts)
    for index, concept in enumerate(config.concepts):
        name = concept.target[0]
        own = [prompt.text for prompt in prompts if prompt.concept == index]
        forms = [name, f"a {name}", f"the {name}"][:plain]
        assert [text for text in own if text in forms][:plain] == forms
    scenes = [[mentions(p.text, config.retain) for p in some] for some in (prompts, usual)]
    assert scenes[0] == scenes[1]
    assert (prompts == usual) == (not plain)


def test_names_alone_come_only_in_the_configs_own_templates(make: Make) -> None:
    config = make("templates=['a {} of dreams', 'the {}', 'a {} and a {} of dreams']")
    prompts = forget_prompts(config, 100, rng=random.Random(0), plain_first=True)
    name = config.concepts[0].target[0]
    alone = [prompt.text for prompt in prompts if not mentions(prompt.text, config.retain)]
    assert alone[0] == f"the {name}"
    assert name not in alone


def test_a_share_of_forget_prompts_shows_something_to_keep(make: Make) -> None:
    config = make("trajectories.scene_share=0.5")
    prompts = forget_prompts(config, 200, rng=random.Random(0))
    shared = sum(mentions(prompt.text, config.retain) for prompt in prompts)
    assert 60 < shared < 140
    alone = forget_prompts(make("trajectories.scene_share=0"), 50, rng=random.Random(0))
    assert not any(mentions(prompt.text, config.retain) for prompt in alone)


def test_no_retain_prompt_has_a_target(make: Make) -> None:
    config = make('retain_captions=["a cat on a wall", "a calm morning", "rain"]')
    words, held = split_vocabulary(config, rng=random.Random(0))
    for vocabulary in (words, held):
        texts = retain_prompts(config, vocabulary, 100, rng=random.Random(0))
        assert texts
        assert not [text for text in texts if mentions(text, ["cat", "kitty"])]
        assert len(texts) == len(set(texts))


def test_words_held_back_are_in_no_prompt_of_the_others(make: Make) -> None:
    config = make()
    words, held = split_vocabulary(config, rng=random.Random(0))
    assert set(words.phrases) | set(held.phrases) == set(config.retain)
    assert len(held.phrases) == 2
    texts = retain_prompts(config, words, 300, rng=random.Random(0))
    assert not [text for text in texts if mentions(text, held.phrases)]


def test_shipped_vocabulary_is_broad_and_has_no_line_twice() -> None:
    captions, templates = (read_lines(DATA / f"{name}.txt") for name in ("captions", "templates"))
    assert len(captions) >= 600
    assert len(templates) >= 100
    assert len(set(captions)) == len(captions)
    assert len(set(templates)) == len(templates)
