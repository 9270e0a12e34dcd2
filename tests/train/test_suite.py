"""What a suite asks, and what it refuses to ask."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from demo.world.bench import DemoWorld
from demo.world.concepts import load_concepts, load_held_out
from train.config import DATA, ConfigError, load_config
from train.evaluate.base import Kind
from train.evaluate.suite import Seen, Suite, SuiteError, ask_world, load_suite
from unhype.checkpoint import BaseFingerprint, ConceptInfo, PackInfo
from unhype.families import FAMILIES
from unhype.gate import GateConfig
from unhype.hypernetwork import Architecture, HypernetworkConfig

FAMILY = next(iter(FAMILIES.values()))
REPOSITORY = Path(__file__).resolve().parents[2]
SUITE = {
    "things": {
        "cat": {"synonyms": ["feline"], "siblings": ["tiger"]},
        "tiger": {"phrases": ["tiger", "big striped cub"]},
        "bus": {},
        "egg": {},
    },
    "templates": ["a {} at the fair", "my {}"],
    "scenes": ["a {} versus a {}"],
    "long": ["a table with many things on it, among them a {}"],
    "plain": ["an empty street"],
    "sampling": {"steps": 2, "guidance_scale": 3, "size": 64},
    "seeds": 2,
}
TRAINING = {
    "concepts": [{"name": "cat", "target": ["cat", "kitty"], "anchor": "a meadow"}],
    "retain": ["dog", "wolves"],
    "retain_captions": ["rain over the hills"],
    "templates": ["a {}", "a {} and a {}"],
}


def make_info(*concepts: ConceptInfo, training: dict[str, object] | None = None) -> PackInfo:
    concepts = concepts or (ConceptInfo("cat", ("cat", "kitty"), "a meadow"),)
    dim = FAMILY.embedding.dim
    return PackInfo(
        family=FAMILY.name,
        base=BaseFingerprint("base", "0"),
        hypernetwork=HypernetworkConfig(Architecture.ATOMS, dim, rank=1, hidden_dim=1),
        targets=(),
        gate=GateConfig(dim, len(concepts)),
        concepts=concepts,
        training=TRAINING if training is None else training,
    )


def written(folder: Path, text: str) -> Path:
    path = folder / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def changed(folder: Path, **changes: object) -> Suite:
    return load_suite(written(folder, yaml.safe_dump({**SUITE, **changes}, sort_keys=False)))


def test_things_take_their_roles_from_the_pack(tmp_path: Path) -> None:
    asked = changed(tmp_path).assignment("mine", make_info())
    kinds = Counter(question.kind for question in asked.questions)
    assert kinds == {
        Kind.TARGET: 2,
        Kind.SYNONYM: 2,
        Kind.SIBLING: 4,
        Kind.UNRELATED: 4,
        Kind.SCENE: 3,
        Kind.LONG: 1,
        Kind.PLAIN: 1,
    }
    texts = {question.text: question for question in asked.questions}
    assert texts["an egg at the fair"].shows == ("egg",)
    assert texts["my feline"].shows == ("cat",)
    assert texts["my big striped cub"].kind is Kind.SIBLING
    assert all(q.shows[0] == "cat" for q in asked.questions if q.kind is Kind.SCENE)
    assert asked.labels == ("cat", "tiger", "bus", "egg")
    assert (asked.seeds, asked.sampling.steps, asked.checked) == (2, 2, True)


def test_another_pack_gives_other_roles(tmp_path: Path) -> None:
    info = make_info(ConceptInfo("vehicles", ("bus", "tram"), "a road"), training={})
    asked = changed(tmp_path).assignment("mine", info)
    targets = {q.word for q in asked.questions if q.kind is Kind.TARGET}
    kept = {q.word for q in asked.questions if q.kind is Kind.UNRELATED}
    assert targets == {"bus"}
    assert kept == {"cat", "tiger", "big striped cub", "egg"}
    assert not asked.checked


def test_a_pack_that_erases_nothing_of_it_is_refused(tmp_path: Path) -> None:
    info = make_info(ConceptInfo("ship", ("ship",), "the sea"))
    with pytest.raises(SuiteError, match="asks for cat, tiger, bus, egg, but the pack erases ship"):
        changed(tmp_path).assignment("mine", info)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("retain", ["dog", "eggs"], "'egg' (in 'eggs')"),
        ("retain", ["the bus"], "'bus' (in 'the bus')"),
        ("retain_captions", ["a feline by the fire"], "'feline' (in 'a feline by the fire')"),
        ("retain_captions", ["An  empty street"], "'an empty street' (in 'An  empty street')"),
        ("templates", ["my {}"], "'my {}'"),
        ("templates", ["a {} versus a {}"], "'a {} versus a {}'"),
        ("concepts", [{"target": ["tigers"], "anchor": "x"}], "'tiger' (in 'tigers')"),
        ("concepts", [{"target": ["cat"], "anchor": "an empty street"}], "'an empty street'"),
        ("extends", {"training": {"retain": ["bus"]}}, "'bus'"),
    ],
)
def test_what_training_saw_is_not_held_out(
    tmp_path: Path, key: str, value: object, named: str
) -> None:
    info = make_info(training={**TRAINING, key: value})
    with pytest.raises(SuiteError) as error:
        changed(tmp_path).assignment("mine", info)
    assert "Not held out" in str(error.value)
    assert named in str(error.value)


def test_what_the_suite_owns_up_to_is_asked_and_named(tmp_path: Path) -> None:
    info = make_info(training={**TRAINING, "retain": ["bus"], "templates": ["my {}"]})
    asked = changed(tmp_path, trained=["bus", "my {}"]).assignment("mine", info)
    assert asked.not_held_out == {"bus": "bus", "my {}": "my {}"}


def test_words_of_things_that_are_not_erased_may_be_anything(tmp_path: Path) -> None:
    info = make_info(
        ConceptInfo("bus", ("bus",), "a road"), training={"retain": ["feline"], "templates": ["{}"]}
    )
    assert changed(tmp_path).assignment("mine", info).not_held_out == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"things": {"cat": {"siblings": ["lion"]}, "bus": {}}}, "sibling 'lion' of 'cat'"),
        ({"things": {"cat": {}}}, "expected at least"),
        ({"things": {"cat": {"synonyms": ["pet"]}, "dog": {"phrases": ["pet"]}}}, "'pet' is of"),
        ({"templates": ["a photo"]}, r"line \d+: template 'a photo' must hold {} once"),
        ({"scenes": ["a {}"]}, "must hold {} twice"),
        ({"labels": ["cat", "tiger"]}, "labels lack 'bus'"),
        ({"trained": ["kitten"]}, "trained names 'kitten', which the suite does not ask"),
        ({"sampling": {"steps": 0}}, r"sampling.steps in .* is 0, expected at least 1"),
        ({"sampling": {"step": 3}}, r"Unknown key 'sampling.step' in .*Known: steps"),
        ({"seed": 3}, r"Unknown key 'seed' in .*, line \d+. Known: things"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        changed(tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("things: {cat: {}, cat: {}}\ntemplates: ['{}']", "'cat' stands twice"),
        ("things: [", "cannot be read as YAML"),
        ("- cat", "holds no keys"),
        ("things: {cat: {}, dog: {}}", "'templates' is missing"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_suite(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="There is no suite"):
        load_suite(tmp_path / "none.yaml")


@pytest.mark.parametrize("config", ["sd15-objects.yaml", "sd15-cifar10.yaml"])
def test_the_shipped_suite_fits_the_shipped_configs(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    settings = load_config(REPOSITORY / "train" / "configs" / config)
    info = make_info(
        *(ConceptInfo(c.name, c.target, c.anchor) for c in settings.concepts),
        training=settings.plain(),
    )
    asked = load_suite(DATA / "suites" / "sd15-cifar10.yaml").assignment("sd15-cifar10", info)
    assert len(asked.labels) == 10
    targets = [q.word for q in asked.questions if q.kind is Kind.TARGET]
    assert targets == [c.name for c in settings.concepts]
    synonyms = [q for q in asked.questions if q.kind is Kind.SYNONYM]
    assert len(synonyms) == 3 * len(targets)


def test_the_demo_world_asks_a_pack_for_what_it_never_saw() -> None:
    held_out = load_held_out().synonyms["cat"]
    info = make_info(training={**TRAINING, "retain_captions": [f"a {held_out[0]} at home"]})
    asked = ask_world(DemoWorld(), info, 3)
    by_kind = {kind: {q.word for q in asked.questions if q.kind is kind} for kind in Kind}
    assert by_kind[Kind.TARGET] == {"cat"}
    assert by_kind[Kind.SYNONYM] == set(held_out[1:])
    assert by_kind[Kind.SIBLING] == {"tiger", "lion", "leopard"}
    assert not by_kind[Kind.UNRELATED] & {"dog", "wolf"}
    assert (asked.suite, asked.seeds, asked.not_held_out) == ("demo", 3, {})


def test_the_demo_world_has_nothing_to_ask_a_pack_that_saw_everything() -> None:
    everything = [concept.name for concept in load_concepts() if concept.name != "cat"]
    with pytest.raises(ValueError, match="nothing unseen is left"):
        ask_world(DemoWorld(), make_info(training={"retain": everything}), 1)


def test_seen_goes_back_through_extensions() -> None:
    first = {"retain": ["oak"], "concepts": [{"target": ["elm"], "anchor": "a field"}]}
    info = make_info(training={**TRAINING, "extends": {"pack": "old", "training": first}})
    seen = Seen.by(info)
    assert {"oak", "elm", "a field", "dog", "kitty"} <= set(seen.phrases)
    assert seen.word("wolf") == "wolves"
    assert seen.word("ash") is None


def test_what_discovery_took_in_was_seen() -> None:
    def found(word: str) -> dict[str, object]:
        return {"discovered": {"cat": {"same": [word], "different": [f"{word}like"]}}}

    extends = {"pack": "old", "training": TRAINING, **found("tom")}
    metrics = {"removal": {"metrics": found("moggy")}, **found("puss")}
    info = make_info(training={**TRAINING, "extends": extends})
    seen = Seen.by(replace(info, metrics=metrics))
    assert {"puss", "pusslike", "tom", "tomlike", "moggy", "moggylike"} <= set(seen.phrases)
