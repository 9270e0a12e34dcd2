"""Runs named in a few words: the same config as a file's, and the file that repeats them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from train.config import DATA, ConfigError, TrainConfig, load_config, read_lines
from train.prompts import split_templates
from train.shorthand import Shorthand, ordinary_words, settings_path, write_settings

CAT = Shorthand(Path("model.safetensors"), ("cat, kitty",), ("an empty meadow",))


def refused(words: Shorthand) -> str:
    with pytest.raises(ConfigError) as caught:
        words.config()
    return str(caught.value)


def test_the_first_phrase_names_concept_and_pack() -> None:
    config = CAT.config()
    (concept,) = config.concepts
    assert (concept.name, concept.target) == ("cat", ("cat", "kitty"))
    assert config.output == Path("unhype-cat.safetensors")


def test_concepts_share_an_anchor_or_have_one_each() -> None:
    erase = ("cat", "Fighter Jet, jet")
    shared = Shorthand(CAT.checkpoint, erase, ("a road",)).config()
    assert [concept.anchor for concept in shared.concepts] == ["a road", "a road"]
    assert shared.output.name == "unhype-cat-fighter-jet.safetensors"
    each = Shorthand(CAT.checkpoint, erase, ("a road", "a sky")).config()
    assert [concept.anchor for concept in each.concepts] == ["a road", "a sky"]
    assert "Got 2 --erase and 3 --anchor" in refused(Shorthand(CAT.checkpoint, erase, ("a",) * 3))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (Shorthand(None, ("cat",), ("a road",)), "--checkpoint"),
        (Shorthand(CAT.checkpoint, (), ("a road",)), "--erase"),
        (Shorthand(CAT.checkpoint, ("cat",)), "--anchor"),
    ],
)
def test_what_is_missing_is_named(words: Shorthand, option: str) -> None:
    assert f"{option} is missing: give" in refused(words)


def test_what_ordinary_things_mention_is_not_kept() -> None:
    words = ordinary_words(["car", "Bear", "man"])
    assert not {"car", "bear", "teddy bear", "man", "old man"} & set(words)
    assert {"carpet", "woman", "cat"} <= set(words)


def test_a_target_in_the_plural_is_not_kept_in_the_singular() -> None:
    singular = next(word for word in ordinary_words([]) if " " not in word)
    assert singular not in ordinary_words([f"{singular}s"])
    words = Shorthand(CAT.checkpoint, (f"{singular}s",), CAT.anchor)
    assert singular not in words.config().retain


def test_what_stays_comes_from_a_file_or_from_words(tmp_path: Path) -> None:
    file = tmp_path / "keep.txt"
    file.write_text("# mine\na dog\nbus\n")
    kept = [
        Shorthand(CAT.checkpoint, CAT.erase, CAT.anchor, text).config().retain
        for text in (str(file), "a dog, bus")
    ]
    assert kept == [("a dog", "bus")] * 2
    missing = Shorthand(CAT.checkpoint, CAT.erase, CAT.anchor, str(tmp_path / "absent.txt"))
    assert "--retain: there is no file" in refused(missing)
    target = Shorthand(CAT.checkpoint, CAT.erase, CAT.anchor, "dog, kitty")
    assert "retain phrase 'kitty' is also a target phrase" in refused(target)


def test_the_settings_file_repeats_the_run(tmp_path: Path) -> None:
    words = Shorthand(
        Path("modèle: 1.safetensors"),
        ("no, 1e-3, [cat]", "größe"),
        ("yes", "an 'empty' meadow # here"),
        output=tmp_path / "new" / "pack.safetensors",
    )
    config = words.config(["train.lr=1e-5", "gate.threshold_position=0.25", "license=''"])
    path = write_settings(config)
    assert path == tmp_path / "new" / "pack.yaml"
    assert load_config(path) == config
    assert load_config(path).digest() == config.digest()
    assert [file.name for file in path.parent.iterdir()] == ["pack.yaml"]


def test_the_settings_file_names_every_setting_and_stays_readable(tmp_path: Path) -> None:
    config = Shorthand(*vars(CAT).values()).config([f"output={tmp_path / 'pack.safetensors'}"])
    written = yaml.safe_load(write_settings(config).read_text())
    assert TrainConfig.model_fields.keys() - written.keys() == {"retain_captions", "templates"}
    own = config.model_copy(update={"templates": ("a {}", "a {} and a {}")})
    path = settings_path(own.output)
    path.unlink()
    write_settings(own)
    assert load_config(path) == own


def test_edited_settings_are_not_overwritten(tmp_path: Path) -> None:
    config = CAT.config([f"output={tmp_path / 'pack.safetensors'}"])
    path = write_settings(config)
    write_settings(config)
    path.write_text(path.read_text().replace("- name: cat", "- name: house cat"))
    edited = path.read_text()
    with pytest.raises(ConfigError, match="is there already, with other settings"):
        write_settings(config)
    assert path.read_text() == edited


def test_held_out_templates_are_never_trained_on() -> None:
    held_out = read_lines(DATA / "held_out_templates.txt")
    assert not set(held_out) & set(read_lines(DATA / "templates.txt"))
    sorted_ = split_templates(held_out)
    assert sorted_.single
    assert sorted_.pair
    assert len(sorted_.single) + len(sorted_.pair) == len(held_out)
