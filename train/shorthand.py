"""A run in a few words: the config of what a command line names, and the YAML file that repeats it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from .config import DATA, ConfigError, TrainConfig, load_config, make_config, read_lines
from .phrases import forms, mentions

OWN_LISTS = ("retain_captions", "templates")
"""Lists of the package that a settings file leaves out where they are unchanged, to stay readable."""
MISSING = {
    "checkpoint": "the model file that ComfyUI loads",
    "erase": 'the phrases of a concept, for example --erase "cat, kitty"',
    "anchor": 'what is drawn in its place, for example --anchor "an empty meadow"',
}


@dataclass(frozen=True)
class Shorthand:
    """What can be said of a run without a config file.

    Attributes:
        text_encoder: files of their own, if the checkpoint holds none.
        erase: for each concept its phrases with commas between; the first one names it.
        anchor: what is drawn instead, for each concept or for all.
        retain: a text file, one phrase a line, or phrases with commas between; ordinary things by default.
        output: by default named after the concepts, in the current folder.
    """

    checkpoint: Path | None = None
    erase: tuple[str, ...] = ()
    anchor: tuple[str, ...] = ()
    retain: str | None = None
    output: Path | None = None
    text_encoder: tuple[Path, ...] = ()

    @property
    def options(self) -> list[str]:
        """The options that were given."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if getattr(self, field.name)
        ]

    def config(self, overrides: Sequence[str] = ()) -> TrainConfig:
        """The config; see :func:`load_config` for ``overrides``.

        Raises:
            ConfigError: something is missing or wrong.
        """
        for name, what in MISSING.items():
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing: give {what}.")
        concepts = [_split(phrases, "--erase") for phrases in self.erase]
        if len(self.anchor) not in (1, len(concepts)):
            raise ConfigError(
                f"Got {len(concepts)} --erase and {len(self.anchor)} --anchor. "
                "Give one anchor for all concepts, or one for each in the same order."
            )
        anchors = self.anchor if len(self.anchor) > 1 else self.anchor * len(concepts)
        names = [phrases[0] for phrases in concepts]
        data = {
            "checkpoint": str(self.checkpoint),
            "text_encoders": [str(path) for path in self.text_encoder],
            "output": str(self.output or f"unhype-{_file_name(names)}.safetensors"),
            "concepts": [
                {"name": name, "target": phrases, "anchor": anchor}
                for name, phrases, anchor in zip(names, concepts, anchors, strict=True)
            ],
            "retain": self._retained([phrase for phrases in concepts for phrase in phrases]),
        }
        return make_config(data, overrides)

    def _retained(self, targets: Sequence[str]) -> list[str]:
        if self.retain is None:
            return ordinary_words(targets)
        if os.path.isfile(self.retain):
            try:
                return list(read_lines(Path(self.retain)))
            except ValueError as error:
                raise ConfigError(f"--retain: {error}.") from error
        if "," not in self.retain and re.search(r"[/\\]|\.\w+$", self.retain):
            raise ConfigError(
                f"--retain: there is no file {self.retain!r}. Give a text file, one phrase a line, "
                "or phrases with commas between."
            )
        return _split(self.retain, "--retain")


def ordinary_words(targets: Sequence[str]) -> list[str]:
    """The package's list of ordinary things, without those that mention a target phrase, in whatever number."""
    named = {form for phrase in targets for form in forms(phrase)}
    return [
        word
        for word in read_lines(DATA / "retain.txt")
        if not mentions(word, targets) and not forms(word) & named
    ]


def settings_path(output: Path) -> Path:
    """Where the settings of a run that had no config file are kept."""
    return output.with_suffix(".yaml")


def write_settings(config: TrainConfig) -> Path:
    """Write a config file that repeats the run, beside its output.

    Raises:
        ConfigError: there is one already that says something else, or it cannot be written.
    """
    path = settings_path(config.output)
    if path.exists():
        if load_config(path) != config:
            raise ConfigError(
                f"{path} is there already, with other settings. Train it with `unhype train {path}`, "
                "delete it, or give another --output."
            )
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(to_yaml(config), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}). Give an --output in a folder that you may write to."
        ) from error
    return path


def to_yaml(config: TrainConfig) -> str:
    """A config as the text of a config file."""
    data = config.plain()
    for name in OWN_LISTS:
        default = TrainConfig.model_fields[name].get_default(call_default_factory=True)
        if getattr(config, name) == default:
            del data[name]
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return (
        "# `unhype train` with this file repeats the run or goes on with it; docs/training.md explains every key.\n"
        "# Paths start from the folder that the command runs in.\n"
        + text.replace(
            "\nretain:",
            "\n# What must stay. Delete what is a kind of the erased; add its closest neighbours.\nretain:",
        )
    )


class _Dumper(yaml.SafeDumper):
    """Writes lists of words in a line, and everything else in lines of its own."""


def _list(dumper: yaml.SafeDumper, items: list[object]) -> yaml.Node:
    words = all(isinstance(item, str) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=words)


_Dumper.add_representer(list, _list)


def _split(text: str, option: str) -> list[str]:
    phrases = [phrase.strip() for phrase in text.split(",") if phrase.strip()]
    if not phrases:
        raise ConfigError(f"{option} got {text!r}. Give phrases with commas between.")
    return list(dict.fromkeys(phrases))


def _file_name(names: Sequence[str]) -> str:
    """Concept names as a part of a file name."""
    return re.sub(r"\W+", "-", "-".join(names).casefold()).strip("-")[:60] or "pack"
