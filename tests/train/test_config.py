"""Every mistake in a config gets a sentence that says where it is and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from train.config import ConfigError, TrainConfig, load_config, make_config

CONFIGS = Path(__file__).resolve().parents[2] / "train" / "configs"
Data = dict[str, object]


def refused(data: Data, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(data, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert load_config(path).concepts


def test_an_unknown_key_is_named_with_its_line_and_a_guess(tmp_path: Path, data: Data) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**data, "train": {"step": 5}}))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "step: 5" in text)
    with pytest.raises(
        ConfigError, match=rf"'train\.step' in .*run\.yaml, line {line}.*Did you mean 'steps'"
    ):
        load_config(path)


def test_every_mistake_is_told_at_once(data: Data) -> None:
    text = refused({**data, "train": {"steps": -1, "lr": "fast"}, "color": 1})
    assert "train.steps is -1, expected at least 1" in text
    assert "train.lr is 'fast', expected a number" in text
    assert "Unknown key 'color'" in text


def test_an_empty_retain_set(data: Data) -> None:
    assert "the retain set is empty" in refused({**data, "retain": []})


def test_a_retain_phrase_that_is_a_target(data: Data) -> None:
    assert "retain phrase 'A Kitty' is also a target phrase of 'cat'" in refused(
        {**data, "retain": ["dog", "A Kitty"]}
    )


def test_an_anchor_that_is_its_own_target(data: Data) -> None:
    concept = {"name": "cat", "target": ["cat"], "anchor": "the cat"}
    assert "the anchor 'the cat' of concept 'cat' is one of its target phrases" in refused(
        {**data, "concepts": [concept]}
    )


def test_a_concept_given_by_name_that_nobody_defines(tmp_path: Path, data: Data) -> None:
    library = tmp_path / "library.yaml"
    library.write_text("cat: {target: [cat], anchor: an empty meadow}\n")
    text = refused({**data, "concept_file": str(library), "concepts": ["cta"]})
    assert "'cta'" in text
    assert "Did you mean 'cat'" in text


def test_a_phrase_of_two_concepts(data: Data) -> None:
    concepts = [{"name": n, "target": ["cat"], "anchor": "a meadow"} for n in ("one", "two")]
    assert "belongs to 'one' and to 'two'" in refused({**data, "concepts": concepts})


def test_blank_phrases(data: Data) -> None:
    concept = {"name": "cat", "target": [" "], "anchor": "a meadow"}
    assert "concepts.0.target.0 is ' ', expected text that is not blank" in refused(
        {**data, "concepts": [concept]}
    )


def test_a_template_without_a_slot(data: Data) -> None:
    assert "must hold {} once" in refused(
        {**data, "templates": ["a photo", "a {}", "a {} and a {}"]}
    )


def test_overrides_win_and_their_mistakes_are_theirs(data: Data) -> None:
    assert make_config(data, ["train.lr=1e-4", "concepts.0.name=tabby"]).train.lr == 1e-4
    assert "train.lr given with --set is -1" in refused(data, "train.lr=-1")
    assert "--set needs key=value" in refused(data, "train.lr")


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("retain: [dog]\nretain: [bus]\n")
    with pytest.raises(ConfigError, match=r"'retain' stands twice .* lines 1 and 2"):
        load_config(path)


def test_a_file_that_is_missing_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "run.yaml").write_text("a: [1,\n")
    with pytest.raises(ConfigError, match=r"line \d+ is not valid YAML"):
        load_config(tmp_path / "run.yaml")


def test_the_digest_is_of_everything_but_the_output(make: Callable[..., TrainConfig]) -> None:
    assert make().digest() == make("output=elsewhere.safetensors").digest()
    assert make().digest() != make("train.lr=1e-5").digest()
