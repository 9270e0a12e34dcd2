"""The configs that come with the package: they load, say what they claim, and keep training's and evaluation's words apart."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from demo.world.concepts import load_concepts
from demo.world.words import touches_held_out
from train.cli import app
from train.config import DATA, ObjectiveName, TrainConfig, load_config, read_lines
from train.phrases import mentions, normal
from unhype.hypernetwork import Architecture

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "train" / "configs"
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
EXPLICIT = ["nudity", "pornography", "erotic art", "naked man", "naked woman"]
IMAGENETTE = [
    *("tench", "English springer", "cassette player", "chain saw", "church"),
    *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
]
CONFUSE = [
    *("golden retriever", "Labrador retriever", "tabby cat", "tiger cat", "orange"),
    *("lemon", "yawl", "lifeboat", "soccer ball", "volleyball"),
]
NAMES = {
    "demo-cat": ["cat"],
    "sd15-objects": ["airplane"],
    "sd15-cifar10": CIFAR,
    "sd15-explicit": EXPLICIT,
    "sd15-imagenette": IMAGENETTE,
    "sd15-confuse5": CONFUSE,
    "sdxl-objects": ["airplane"],
    "sd3-objects": ["airplane"],
    "flux-objects": ["airplane"],
    "flux-explicit": [*EXPLICIT, "bare body"],
}
"""What each erases; of the others, how many."""
NUMBERS = {"demo-4": 4, "demo-16": 16, "demo-64": 64, "sd15-celebrities": 100}
RECIPES = {
    "sd15-objects": (1, 1000),
    "sd15-celebrities": (6, 4000),
    "sd15-explicit": (1, 4000),
    "sd15-imagenette": (6, 6000),
    "sd15-confuse5": (9, 6000),
    "flux-explicit": (4, 5000),
}
"""Rank and iterations of the authors' runs."""
ACC_G_WORDS = [
    *("aircraft", "plane", "jet", "vessel", "boat", "watercraft"),
    *("avian", "fowl", "feline", "kitty", "housecat", "canine", "pooch", "hound"),
    *("car", "vehicle", "motorcar", "hart", "stag", "doe", "amphibian"),
    *("anuran", "tadpole", "equine", "steed", "mount", "lorry", "rig", "hauler"),
]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the paths in the configs start."""
    monkeypatch.chdir(REPOSITORY)


def load(name: str, *overrides: str) -> TrainConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def phrases_of(config: TrainConfig) -> list[str]:
    return [phrase for concept in config.concepts for phrase in concept.target]


def recipe_of(name: str) -> list[str]:
    """The ``--set`` values of the authors' recipe in the comments of a config."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    begin = next(n for n, line in enumerate(lines) if "-authors.safetensors" in line)
    end = next(n for n in range(begin, len(lines)) if not lines[n].endswith("\\"))
    words = shlex.split(" ".join(line.lstrip("# ").rstrip("\\") for line in lines[begin : end + 1]))
    return [value for option, value in zip(words, words[1:], strict=False) if option == "--set"]


def test_every_shipped_config_is_known_here() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == {*NAMES, *NUMBERS}


@pytest.mark.parametrize("name", sorted({*NAMES, *NUMBERS}))
def test_it_is_valid_without_a_warning(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.touch()
    arguments = ["validate", f"train/configs/{name}.yaml", "--set", f"checkpoint={checkpoint}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert not load(name).retained_mentions()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_it_erases_what_it_is_named_after(name: str) -> None:
    assert [concept.name for concept in load(name).concepts] == NAMES[name]


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_it_erases_as_many_as_it_says(name: str) -> None:
    concepts = load(name).concepts
    assert len(concepts) == NUMBERS[name]
    assert all(concept.target[0] == concept.name for concept in concepts)


@pytest.mark.parametrize("name", sorted({*NAMES, *NUMBERS}))
def test_no_phrase_stands_twice(name: str) -> None:
    config = load(name)
    for phrases in (config.retain, phrases_of(config)):
        assert len({normal(phrase) for phrase in phrases}) == len(phrases)


@pytest.mark.parametrize("name", CIFAR)
def test_every_object_can_be_erased_by_itself(name: str) -> None:
    config = load("sd15-objects", f"concepts=[{name}]")
    assert [concept.name for concept in config.concepts] == [name]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_authors_recipe_in_the_comments_loads(name: str) -> None:
    config = load(name, *recipe_of(name))
    rank, steps = RECIPES[name]
    assert config.objective.name is ObjectiveName.JOINT
    assert config.network.architecture is Architecture.HEADS
    assert (config.network.rank, config.network.num_steps) == (rank, 300)
    assert (config.train.steps, config.train.batch_size) == (steps, 1)
    assert config.gate.num_negatives >= config.objective.retain_batch_size
    assert config.output != load(name).output


@pytest.mark.parametrize("name", ["demo-cat", "demo-4", "demo-16", "demo-64"])
def test_the_demo_world_knows_the_words_and_holds_none_of_them_out(name: str) -> None:
    config = load(name)
    known = {word for c in load_concepts() for word in (c.name, *c.synonyms)}
    used = {*config.retain, *phrases_of(config)}
    assert used <= known
    assert not [word for word in used if touches_held_out(word)]
    assert {concept.anchor for concept in config.concepts} == {"an empty meadow"}


def test_larger_demo_runs_hold_the_smaller_ones_and_leave_concepts_to_evaluation() -> None:
    sizes = ("demo-cat", "demo-4", "demo-16", "demo-64")
    erased = [{concept.name for concept in load(name).concepts} for name in sizes]
    assert erased == sorted(erased, key=len)
    assert all(less < more for less, more in zip(erased, erased[1:], strict=False))
    for name, gone in zip(sizes, erased, strict=True):
        config = load(name)
        assert config.gate.num_positives >= max(300, 20 * len(gone))
        others = {concept.name for concept in load_concepts()} - gone
        assert len(others - set(config.retain)) >= 20


def test_a_hundred_people_go_and_a_hundred_others_stay() -> None:
    config = load("sd15-celebrities")
    assert {concept.anchor for concept in config.concepts} == {"a man", "a woman"}
    people = [phrase for phrase in config.retain if not re.match(r"an? ", phrase)]
    assert len(people) == 100
    for template in config.templates:
        assert not re.search(r"\b(a|an|the) \{\}", template)


def test_words_that_evaluation_asks_for_are_not_trained() -> None:
    for name in ("sd15-objects", "sd15-cifar10"):
        config = load(name, f"concepts={CIFAR}")
        assert not [word for word in config.retain if mentions(word, [*CIFAR, *ACC_G_WORDS])]
        assert not [word for word in phrases_of(config) if mentions(word, ACC_G_WORDS)]
    keeps = {
        *("cat", "car", "tree", "house", "bicycle"),
        *("flower", "mountain", "river", "airplane", "boat"),
    }
    assert not {normal(phrase) for phrase in load("sd15-imagenette").retain} & keeps
    siblings = {"German shepherd", "Persian cat", "pomegranate", "speedboat", "tennis ball"}
    assert siblings <= set(load("sd15-confuse5").retain)


@pytest.mark.parametrize("name", ["sd15-explicit", "flux-explicit"])
@pytest.mark.parametrize("recipe", [False, True])
def test_training_on_explicit_content_puts_nobody_beside_it(name: str, recipe: bool) -> None:
    config = load(name, *(recipe_of(name) if recipe else ()))
    assert config.trajectories.scene_share == 0
    minors = ["baby", "child", "kid", "toddler", "infant", "boy", "girl", "teenager", "young"]
    others = ["family", "mother", "father", "son", "daughter", "pupil", "student", "dog", "cat"]
    phrases = [*config.retain, *phrases_of(config), *config.templates]
    assert not [phrase for phrase in phrases if mentions(phrase, [*minors, *others])]


@pytest.mark.parametrize("name", ["templates_bare.txt", "templates_people.txt"])
def test_further_templates_are_neither_evaluated_nor_repeated(name: str) -> None:
    lines = read_lines(DATA / name)
    assert len(lines) >= 55
    assert len(set(lines)) == len(lines)
    assert not set(lines) & set(read_lines(DATA / "held_out_templates.txt"))
    if "people" in name:
        evaluated = ("a portrait of {}", "an oil painting of {}", "a sketch of {}")
        assert not set(lines) & {*evaluated, "an image capturing {} at a public event"}


@pytest.mark.parametrize("name", ["cifar10", "explicit"])
def test_every_concept_of_a_library_is_used(name: str) -> None:
    library = yaml.safe_load((DATA / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(library) == set(CIFAR if name == "cifar10" else NAMES["flux-explicit"])


def test_the_manual_lists_every_shipped_config() -> None:
    manual = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    assert not [path.name for path in CONFIGS.iterdir() if f"`{path.name}`" not in manual]
