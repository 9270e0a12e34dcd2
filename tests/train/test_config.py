"""Every mistake in a config gets a sentence that says where it is and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from train.cli import app
from train.config import (
    ConfigError,
    TrainConfig,
    for_whole_lora,
    in_closed_form,
    load_config,
    make_config,
)

Data = dict[str, object]


def refused(data: Data, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(data, overrides)
    return str(caught.value)


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


@pytest.mark.parametrize(
    ("target", "kept"),
    [("cat", "the  cats"), ("bus", "buses"), ("cats", "a cat"), ("pony", "ponies"), ("wolf", "wolves"), ("field mouse", "field mice")],
)  # fmt: skip
def test_a_retain_phrase_that_is_a_target_in_another_number(
    data: Data, target: str, kept: str
) -> None:
    concept = {"name": "it", "target": [target], "anchor": "a meadow"}
    text = refused({**data, "concepts": [concept], "retain": ["dog", kept]})
    assert f"retain phrase {kept!r} is in another number a target phrase of 'it'" in text


def test_a_retain_phrase_that_holds_a_target_is_told_but_allowed(data: Data) -> None:
    config = make_config({**data, "retain": ["hot dog", "Tabby cats", "catalog", "bus"]})
    assert config.retained_mentions() == {"Tabby cats": "cat"}


@pytest.mark.parametrize("command", [["validate"], ["train", "--comfyui", "."]])
def test_the_command_line_warns_of_retain_phrases_that_hold_a_target(
    command: list[str], data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = tmp_path / "tiny.safetensors", tmp_path / "run.yaml"
    model.touch()
    path.write_text(
        yaml.safe_dump({**data, "checkpoint": str(model), "retain": ["big cat", "bus"]})
    )
    CliRunner().invoke(app, [*command, str(path)])
    assert "hold a target phrase: 'big cat' ('cat')" in caplog.text


def test_last_words_of_targets_that_nothing_is_trained_on_are_told(data: Data) -> None:
    def parts(target: list[str], *retain: str) -> dict[str, str]:
        concept = {"name": "it", "target": target, "anchor": "a meadow"}
        return make_config(
            {**data, "concepts": [concept], "retain": ["bus", *retain]}
        ).parts_of_targets()

    assert parts(["hot dog", "frankfurter", "skeleton head"]) == {
        "dog": "hot dog",
        "head": "skeleton head",
    }
    assert parts(["hot dog", "skeleton head"], "friendly dogs") == {"head": "skeleton head"}
    assert not parts(["wild cats", "cat"])
    assert not parts(["Brad Pitt", "R2 D2", "cat "])


def test_the_command_line_warns_of_parts_of_targets(
    data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = tmp_path / "tiny.safetensors", tmp_path / "run.yaml"
    model.touch()
    concept = {"name": "it", "target": ["hot dog"], "anchor": "a meadow"}
    settings = {**data, "checkpoint": str(model), "concepts": [concept], "retain": ["bus"]}
    path.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 0
    assert "neither erased nor retained: 'dog' ('hot dog')" in caplog.text


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


@pytest.mark.parametrize("phrase", ["\u200b", "...", "\u2764\ufe0f"])
def test_phrases_without_a_word(data: Data, phrase: str) -> None:
    concept = {"name": "cat", "target": ["cat", phrase], "anchor": "a meadow"}
    text = refused({**data, "concepts": [concept], "retain": ["dog", phrase]})
    for key in ("concepts.0.target.1", "retain.1"):
        assert f"{key}: got {phrase!r}, expected a phrase with a letter or digit" in text


def test_phrases_of_any_script(data: Data) -> None:
    concept = {
        "name": "\u732b",
        "target": ["\u732b", "\u043a\u043e\u0442", "42"],
        "anchor": "a meadow",
    }
    assert len(make_config({**data, "concepts": [concept]}).concepts[0].target) == 3


def test_wrong_types_are_told_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "checkpoint: 3\n"
        "output: pack.safetensors\n"
        "concepts: cat\n"
        "retain:\n"
        "  - dog\n"
        "  - no\n"
        "gate: {noise: loud}\n"
        "train: [5]\n"
        "trajectories:\n"
        "  keep: 1\n"
        "  size: 64.5\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for sentence in (
        f"checkpoint in {path}, line 1 is 3, expected a file name",
        f"concepts in {path}, line 3 is 'cat', expected a list",
        f"retain.1 in {path}, line 6 is False, expected text",
        f"gate.noise in {path}, line 7 is 'loud', expected a number",
        f"train in {path}, line 8 is [5], expected a section with keys",
        f"trajectories.keep in {path}, line 10 is 1, expected true or false",
        f"trajectories.size in {path}, line 11 is 64.5, expected a whole number",
    ):
        assert sentence in str(caught.value)


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


def untold(data: Data, count: int, objective: str, **sections: object) -> TrainConfig:
    """A run of so many concepts, of which nothing else is set but these sections."""
    concepts = [{"name": f"thing{n}", "target": [f"thing{n}"]} for n in range(count)]
    concepts = [{**concept, "anchor": "an empty meadow"} for concept in concepts]
    own = {**data, "concepts": concepts, "objective": {"name": objective}}
    for section in ("network", "gate", "trajectories", "train"):
        own.pop(section, None)
    return make_config({**own, **sections})


def test_many_concepts_in_closed_form_get_a_lenient_gate_that_writes_less_where_it_is_unsure(
    data: Data,
) -> None:
    def settings(count: int, **gate: object) -> tuple[float, ...]:
        got = untold(data, count, "closed-form", gate=gate).gate
        where = got.threshold_position, got.false_fire_rate
        return *where, got.least_strength, got.full_strength_at

    assert settings(1) == (0.25, 0.1, 0.5, 0.9)
    assert settings(2) == settings(4) == (0.15, 0.1, 0.5, 0.9)
    assert settings(5) == settings(16) == (0, 0.15, 0.5, 0.9)
    assert settings(17) == (0, 0.5, 0.5, 0.9)
    assert settings(17, threshold_position=0.4, least_strength=0.6) == (0.4, 0.5, 0.6, 0.9)
    assert untold(data, 17, "direct").gate.least_strength == 1


@pytest.mark.parametrize("objective", ["direct", "joint", "closed-form"])
def test_the_gate_reads_more_prompts_of_more_concepts(data: Data, objective: str) -> None:
    def prompts(count: int, **gate: object) -> tuple[int, int]:
        config = untold(data, count, objective, gate=gate).gate
        return config.num_positives, config.num_negatives

    assert [prompts(count) for count in (1, 4, 16, 100)] == [
        *((1200, 4000), (1200, 4120)),
        *((1536, 4600), (9600, 7960)),
    ]
    assert prompts(16, num_positives=700) == (700, 4600)


def test_no_more_fires_in_vain_where_all_of_the_lora_is_written(data: Data) -> None:
    def rate(**gate: object) -> float:
        return untold(data, 17, "closed-form", gate=gate).gate.false_fire_rate

    assert (rate(), rate(least_strength=1)) == (0.5, 0.1)
    assert rate(least_strength=1, false_fire_rate=0.3) == 0.3
    lenient = untold(data, 17, "closed-form").gate
    assert for_whole_lora(lenient, 17).false_fire_rate == 0.1
    own = lenient.model_copy(update={"false_fire_rate": 0.3})
    assert for_whole_lora(own, 17) == own


def test_refining_takes_less_than_learning_anew_and_grows_with_the_concepts(data: Data) -> None:
    def length(config: TrainConfig) -> tuple[int, int]:
        return config.trajectories.rollouts, config.train.steps

    def lengths(objective: str) -> list[tuple[int, int]]:
        return [length(untold(data, count, objective)) for count in (1, 4, 16)]

    assert lengths("closed-form") == [(20, 60), (36, 104), (64, 182)]
    assert lengths("direct") == [(48, 300), (86, 522), (154, 909)]
    assert lengths("joint") == 3 * [(48, 300)]
    assert in_closed_form(untold(data, 4, "direct")) == untold(data, 4, "closed-form")
    own = untold(data, 4, "direct", train={"steps": 9}, trajectories={"rollouts": 7})
    assert length(own) == length(in_closed_form(own)) == (7, 9)
    assert length(in_closed_form(own, own_length=True)) == (36, 104)


def test_concepts_of_a_wrong_type_in_closed_form(data: Data) -> None:
    told = refused({**data, "concepts": 7, "objective": {"name": "closed-form"}})
    assert "concepts" in told


def test_the_digest_names_text_encoders_only_where_there_are_some_in_any_order(
    data: dict[str, object],
) -> None:
    digests = {
        make_config({**data, "text_encoders": files}).digest()
        for files in ([], ["a.sft", "b.sft"], ["b.sft", "a.sft"])
    }
    assert len(digests) == 2
    assert make_config({**data, "vae": "vae.sft"}).digest() == make_config(data).digest()
