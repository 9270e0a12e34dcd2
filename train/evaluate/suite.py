"""What an evaluation asks of a pack: a strict YAML file of things, words and templates, or what a world asks.

A suite does not say what is erased: that the pack says. Things of the suite that the pack erases become targets, their look-alikes
siblings, all others unrelated.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from unhype.checkpoint import PackInfo

from ..config import (
    STRICT,
    ConfigError,
    Count,
    Line,
    Lines,
    Phrase,
    Phrases,
    Positive,
    Source,
    explain,
    refuse_repeated_keys,
    to_tuple,
)
from ..phrases import forms, mentions, normal
from ..prompts import fill
from .base import Kind, Question, Sampling, World

OTHERS_IN_SCENES = 4
"""Things that an erased one is shown with in every scene template."""


class SuiteError(ConfigError):
    """A suite is wrong, or asks for what the pack was trained on."""


@dataclass(frozen=True)
class Seen:
    """What the training of a pack read, as the pack says; nothing but its targets if ``recorded`` is false.

    Attributes:
        phrases: targets, anchors, retain phrases, and words that discovery took in.
        captions: whole texts that it kept.
        templates: with slots for phrases.
    """

    phrases: tuple[str, ...]
    captions: tuple[str, ...]
    templates: tuple[str, ...]
    recorded: bool

    @staticmethod
    def by(info: PackInfo) -> Seen:
        """What a pack's training saw, all runs of an extended pack together."""
        runs: list[Mapping[str, Any]] = []
        found = list(_discovered(info.metrics))
        run: Mapping[str, Any] | None = info.training
        while run:
            runs.append(run)
            extends = run.get("extends") or {}
            found += _discovered(extends)
            run = extends.get("training")
        phrases = [phrase for c in info.concepts for phrase in (*c.target, c.anchor)]
        for run in runs:
            phrases += run.get("retain") or ()
            for concept in run.get("concepts") or ():
                phrases += [*concept["target"], concept["anchor"]]
        for words in found:
            phrases += [*(words.get("same") or ()), *(words.get("different") or ())]

        def every(key: str) -> tuple[str, ...]:
            return tuple(dict.fromkeys(line for run in runs for line in run.get(key) or ()))

        return Seen(
            tuple(dict.fromkeys(phrases)), every("retain_captions"), every("templates"), bool(runs)
        )

    def word(self, phrase: str) -> str | None:
        """What of the training names a phrase, in either number, if anything does."""
        spoken = (*self.phrases, *self.captions, *self.templates)
        # Also the other way round: training may know "cats", and the suite ask for "cat".
        return next((text for text in spoken if mentions(text, [phrase])), None) or next(
            (text for text in self.phrases if normal(phrase) in forms(text)), None
        )

    def text(self, text: str) -> str | None:
        """The caption, phrase or template of the training that is this text, if one is."""
        spoken = (*self.captions, *self.phrases, *self.templates)
        return next((other for other in spoken if normal(other) == normal(text)), None)


def _discovered(metrics: Mapping[str, Any]) -> Iterator[Mapping[str, Sequence[str]]]:
    """Words that discovery took in for each concept, of a pack from which concepts were taken out, too."""
    yield from (metrics.get("discovered") or {}).values()
    removal = metrics.get("removal") or {}
    if before := removal.get("metrics"):
        yield from _discovered(before)


@dataclass(frozen=True)
class Assignment:
    """All that one pack is asked, and how.

    Attributes:
        suite: the name of what asks.
        questions: each is drawn once a seed.
        labels: what the evaluator must see.
        seeds: how often everything is asked, each time from other noise.
        not_held_out: words, templates and prompts that training has seen, with its own text.
        checked: whether the pack says what it was trained on.
    """

    suite: str
    questions: tuple[Question, ...]
    labels: tuple[str, ...]
    sampling: Sampling
    seeds: int
    not_held_out: dict[str, str]
    checked: bool


@runtime_checkable
class AskingWorld(World, Protocol):
    """A world that has questions for packs trained in it."""

    def questions(self, info: PackInfo, seed: int) -> Sequence[Question]:
        """What to ask a pack; ``ValueError`` if it erases nothing of this world."""
        ...


def _has_slots(count: int) -> AfterValidator:
    def check(template: str) -> str:
        rest = template.replace("{}", "", count)
        if template.count("{}") != count or "{" in rest or "}" in rest:
            times = "once" if count == 1 else "twice"
            raise ValueError(f"template {template!r} must hold {{}} {times}, and no other braces")
        return template

    return AfterValidator(check)


Template = Annotated[Line, _has_slots(1)]
Templates = Annotated[tuple[Template, ...], BeforeValidator(to_tuple)]
SceneTemplates = Annotated[tuple[Annotated[Line, _has_slots(2)], ...], BeforeValidator(to_tuple)]


class SamplingConfig(BaseModel):
    """How pictures are drawn; ``size`` in pixels."""

    model_config = STRICT

    steps: Count = 30
    guidance_scale: Positive = 7.5
    size: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    batch_size: Count = 4

    def sampling(self) -> Sampling:
        """The same as a value."""
        return Sampling(self.steps, self.guidance_scale, self.size, self.batch_size)


class ThingConfig(BaseModel):
    """Something that prompts ask for; its name is its label.

    Attributes:
        phrases: what prompts call it; its name by default.
        synonyms: held-out words for it, asked when it is erased.
        siblings: names of its look-alikes, which must stay when it is erased.
    """

    model_config = STRICT

    phrases: Phrases = ()
    synonyms: Phrases = ()
    siblings: Phrases = ()


class Suite(BaseModel):
    """One file.

    Attributes:
        things: by name; the pack's concepts of the same name, or with that name among their phrases, are the targets.
        labels: what the evaluator tells apart, in this order; the names of all things by default.
        templates: prompts of one thing.
        scenes: prompts of an erased thing and another.
        long: prompts that name one thing among many words.
        plain: prompts that name nothing.
        trained: of the words, templates and prompts here those that training may know.
        seeds: how often each prompt is drawn.
    """

    model_config = STRICT

    things: Annotated[dict[Phrase, ThingConfig], Field(min_length=2)]
    templates: Annotated[Templates, Field(min_length=1)]
    labels: Phrases = ()
    scenes: SceneTemplates = ()
    long: Templates = ()
    plain: Lines = ()
    trained: Phrases = ()
    sampling: SamplingConfig = SamplingConfig()
    seeds: Count = 4

    @model_validator(mode="after")
    def _names_are_known(self) -> Suite:
        for name, thing in self.things.items():
            for sibling in thing.siblings:
                if sibling not in self.things or sibling == name:
                    raise ValueError(
                        f"sibling {sibling!r} of {name!r} is not another of the things. Add it to them"
                    )
            if self.labels and name not in self.labels:
                raise ValueError(
                    f"labels lack {name!r}, which prompts ask for. Add it, or leave labels out"
                )
        owners: dict[str, str] = {}
        for name, thing in self.things.items():
            for word in (*thing.phrases, *thing.synonyms):
                if owners.setdefault(normal(word), name) != name:
                    raise ValueError(f"{word!r} is of {owners[normal(word)]!r} and of {name!r}")
        asked = {normal(text) for text in self._everything()}
        for text in self.trained:
            if normal(text) not in asked:
                raise ValueError(
                    f"trained names {text!r}, which the suite does not ask. Remove it, or spell it as the suite does"
                )
        return self

    def _everything(self) -> Iterator[str]:
        """Every word, template and prompt."""
        for name, thing in self.things.items():
            yield from (name, *thing.phrases, *thing.synonyms)
        yield from (*self.templates, *self.scenes, *self.long, *self.plain)

    def erased_by(self, info: PackInfo) -> tuple[str, ...]:
        """The things that a pack erases.

        Raises:
            SuiteError: it erases none of them.
        """
        known = {
            normal(phrase)
            for concept in info.concepts
            for phrase in (concept.name, *concept.target)
        }
        erased = tuple(name for name in self.things if normal(name) in known)
        if not erased:
            raise SuiteError(
                f"The suite asks for {', '.join(self.things)}, but the pack erases {', '.join(info.concept_names)}. "
                "Give a suite for it."
            )
        return erased

    def assignment(self, name: str, info: PackInfo) -> Assignment:
        """What to ask a pack.

        Raises:
            SuiteError: the pack erases none of the things, or was trained on what should be held out.
        """
        erased = self.erased_by(info)
        seen = Seen.by(info)
        return Assignment(
            name,
            tuple(self.questions(erased)),
            self.labels or tuple(self.things),
            self.sampling.sampling(),
            self.seeds,
            self.check_held_out(erased, seen),
            seen.recorded,
        )

    def questions(self, erased: Sequence[str]) -> list[Question]:
        """Every prompt for a pack that erases these things."""
        kin = {sibling for name in erased for sibling in self.things[name].siblings}
        siblings = [name for name in self.things if name in kin and name not in erased]
        unrelated = [name for name in self.things if name not in kin and name not in erased]

        def ask(
            kind: Kind, words: Iterable[tuple[str, str]], forms: Sequence[str]
        ) -> Iterator[Question]:
            for word, name in words:
                for form in forms:
                    yield Question(kind, fill(form, word), (name,), word)

        def named(names: Iterable[str]) -> list[tuple[str, str]]:
            return [(word, name) for name in names for word in self.things[name].phrases or (name,)]

        synonyms = [(word, name) for name in erased for word in self.things[name].synonyms]
        found = [
            *ask(Kind.TARGET, named(erased), self.templates),
            *ask(Kind.SYNONYM, synonyms, self.templates),
            *ask(Kind.SIBLING, named(siblings), self.templates),
            *ask(Kind.UNRELATED, named(unrelated), self.templates),
            *ask(Kind.LONG, [(name, name) for name in erased], self.long),
            *self._scenes(erased, [*unrelated, *siblings]),
            *(Question(Kind.PLAIN, text, ()) for text in self.plain),
        ]
        return list(dict.fromkeys(found))

    def _scenes(self, erased: Sequence[str], others: Sequence[str]) -> Iterator[Question]:
        """An erased thing first and another second, and the other way round, by turns."""
        rng = random.Random("unhype scenes")
        for name in erased:
            for template in self.scenes:
                drawn = rng.sample(others, min(OTHERS_IN_SCENES, len(others)))
                for index, other in enumerate(drawn):
                    pair = (name, other) if index % 2 else (other, name)
                    yield Question(Kind.SCENE, fill(template, *pair), (name, other), name)

    def check_held_out(self, erased: Sequence[str], seen: Seen) -> dict[str, str]:
        """What ``trained`` allows and training has seen, with the training's text.

        Raises:
            SuiteError: training has seen something else.
        """
        words = [
            word
            for name, thing in self.things.items()
            for word in (*(thing.phrases or (name,)), *(thing.synonyms if name in erased else ()))
            if word not in erased
        ]
        texts = (*self.templates, *self.scenes, *self.long, *self.plain)
        found = {word: text for word in words if (text := seen.word(word)) is not None}
        found |= {text: other for text in texts if (other := seen.text(text)) is not None}
        allowed = {normal(text) for text in self.trained}
        refused = {text: other for text, other in found.items() if normal(text) not in allowed}
        if refused:
            listed = ", ".join(
                repr(text) if text == other else f"{text!r} (in {other!r})"
                for text, other in islice(refused.items(), 8)
            )
            more = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
            raise SuiteError(
                f"Not held out: the pack was trained on {listed}{more}. Its figures would look better than they are. "
                "Ask for something else, or list these under `trained`; then the report names them."
            )
        return found


def load_suite(path: Path) -> Suite:
    """Read a suite.

    Raises:
        SuiteError: the file is missing, no YAML, or something in it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError as error:
        raise SuiteError(f"There is no suite {path}. Give the path of a YAML file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise SuiteError(f"{path} cannot be read as YAML: {reason}.") from error
    if not isinstance(data, dict):
        raise SuiteError(f"{path} holds no keys. Known: {', '.join(Suite.model_fields)}.")
    refuse_repeated_keys(tree, path)
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        raise SuiteError(explain(error, Source(path, tree), Suite, "suite")) from error


def ask_world(world: World, info: PackInfo, seeds: int) -> Assignment:
    """What a world asks of a pack.

    Raises:
        SuiteError: the world has no questions for packs.
        ValueError: the pack erases nothing of the world.
    """
    if not isinstance(world, AskingWorld):
        raise SuiteError(
            f"The world {world.name!r} has no questions for packs. Give --suite instead."
        )
    seen = Seen.by(info)
    asked = tuple(world.questions(info, 0))
    labels = tuple(dict.fromkeys(name for question in asked for name in question.shows))
    erased = {q.word for q in asked if q.kind is Kind.TARGET}
    kinds = (Kind.SYNONYM, Kind.SIBLING, Kind.UNRELATED)
    words = dict.fromkeys(q.word for q in asked if q.kind in kinds and q.word not in erased)
    found = {word: text for word in words if (text := seen.word(word)) is not None}
    plain = [q.text for q in asked if q.kind is Kind.PLAIN]
    found |= {text: other for text in plain if (other := seen.text(text)) is not None}
    return Assignment(world.name, asked, labels, world.sampling, seeds, found, seen.recorded)
