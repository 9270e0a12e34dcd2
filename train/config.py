"""A training run as one strict YAML file, and sentences for what is wrong in it."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from unhype.hypernetwork import Architecture

from .phrases import forms, mentions, normal

DATA = Path(__file__).parent / "data"
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class ConfigError(ValueError):
    """What is wrong in a config, one sentence a problem."""


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file without blank ones and ``#`` comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"file {str(path)!r} cannot be read ({type(error).__name__}). Give a text file, one entry a line"
        ) from error
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _to_lines(value: object) -> object:
    return read_lines(Path(value)) if isinstance(value, str) else to_tuple(value)


def _to_path(value: object) -> object:
    return Path(value) if isinstance(value, str) and value.strip() else value


def _to_paths(value: object) -> object:
    return (value,) if isinstance(value, str) else to_tuple(value)


def _to_number(value: object) -> object:
    # YAML 1.1 reads 1e-3 as text; it wants 1.0e-3.
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _to_eta(value: object) -> object:
    number = _to_number(value)
    if value == "auto":
        return value
    if isinstance(number, float | int) and not isinstance(number, bool) and 0 < number < math.inf:
        return float(number)
    raise ValueError(f"got {value!r}, expected auto or a number above 0")


def _names_something(phrase: str) -> str:
    if not any(character.isalnum() for character in phrase):
        raise ValueError(
            f"got {phrase!r}, expected a phrase with a letter or digit. Say it in words, as a prompt would"
        )
    return phrase


Line = Annotated[str, Field(min_length=1, pattern=r"\S")]
Phrase = Annotated[Line, AfterValidator(_names_something)]
Phrases = Annotated[tuple[Phrase, ...], BeforeValidator(to_tuple)]
PhraseLines = Annotated[tuple[Phrase, ...], BeforeValidator(_to_lines)]
Lines = Annotated[tuple[Line, ...], BeforeValidator(_to_lines)]
FilePath = Annotated[Path, BeforeValidator(_to_path)]
FilePaths = Annotated[tuple[FilePath, ...], BeforeValidator(_to_paths)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_to_number), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_to_number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_to_number), Field(ge=0, le=1)]
OpenShare = Annotated[float, BeforeValidator(_to_number), Field(ge=0, lt=1)]


class ConceptConfig(BaseModel):
    """One concept to erase: the phrases that name it, and the phrase drawn in its place."""

    model_config = STRICT

    name: Phrase
    target: Annotated[Phrases, Field(min_length=1)]
    anchor: Phrase

    @model_validator(mode="after")
    def _anchor_differs(self) -> ConceptConfig:
        if normal(self.anchor) in {normal(phrase) for phrase in self.target}:
            raise ValueError(
                f"the anchor {self.anchor!r} of concept {self.name!r} is one of its target phrases. "
                "Name something else to draw instead, for example 'an empty meadow'"
            )
        return self


class NetworkConfig(BaseModel):
    """The hypernetwork.

    Attributes:
        rank: number of atoms a layer has, rank of a head, or rank of a concept's edit.
        directions: into which all edits together move what the layers read, at most.
    """

    model_config = STRICT

    architecture: Annotated[Architecture, Field(strict=False)] = Architecture.ATOMS
    rank: Count = 16
    hidden_dim: Count = 128
    num_steps: Count = 300
    directions: Count = 64

    @model_serializer(mode="wrap")
    def _used_settings(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        edits = self.architecture is Architecture.EDITS
        return {
            key: value for key, value in serialize(self).items() if edits or key != "directions"
        }


class GateConfig(BaseModel):
    """The gate, trained on text embeddings alone.

    Attributes:
        num_positives: prompts with a target phrase, over all concepts.
        num_negatives: prompts without one.
        long_share: share of prompts that stand among whole captions.
        scatter_share: share of prompts with ordinary words between their own.
        noise: standard deviation of the noise on standardized embeddings.
        virtual_negatives: share of negatives that are moved part of the way to a positive.
        hard_share: share of negatives drawn from those that the gate hears most at the time.
        adversarial: how far positives are moved to where the gate sees them least, in standardized embeddings.
        tokens: whether the gate reads every token of a prompt, and fires where any does, or the prompt's end alone.
        held_back: share of retain phrases, captions and positives kept for calibration.
        false_fire_rate: how many of the kept negatives may fire, for all concepts together.
        threshold_position: where the threshold lies between kept negatives (0) and positives (1).
        least_strength: how much of the LoRA is written up to a probability of 0.5; 1 writes all of it wherever the gate fires.
        full_strength_at: probability from which on all of it is written.
    """

    model_config = STRICT

    hidden_dim: Count = 128
    steps: Count = 700
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: Positive = 2e-3
    weight_decay: Number = 0.05
    num_positives: Annotated[int, Field(ge=10)] = 1200
    num_negatives: Annotated[int, Field(ge=10)] = 4000
    long_share: Share = 0.2
    scatter_share: Share = 0.5
    noise: Number = 2.0
    virtual_negatives: Share = 0.0
    hard_share: Share = 0.5
    adversarial: Number = 6.0
    tokens: bool = True
    held_back: Annotated[float, BeforeValidator(_to_number), Field(gt=0, lt=1)] = 0.2
    false_fire_rate: OpenShare = 0.1
    threshold_position: Share = 0.25
    least_strength: Annotated[float, BeforeValidator(_to_number), Field(gt=0, le=1)] = 1.0
    full_strength_at: Annotated[float, BeforeValidator(_to_number), Field(gt=0.5, le=0.9999)] = 0.9


class DiscoveryConfig(BaseModel):
    """Words that the frozen model itself takes for a concept, found in its own vocabulary.

    Attributes:
        words: how many of the vocabulary's most frequent words are looked at; 0 for none.
        candidates: how many of them, the nearest to a concept, the model is asked about.
        same: up to this distance of predictions a word counts as the concept's; 1 is the distance of the anchor's.
        different: from this distance on it counts as something else, which stays.
        exclude: words never looked at, so that an evaluation can ask for them later.
    """

    model_config = STRICT

    words: Annotated[int, Field(ge=0)] = 0
    candidates: Count = 24
    same: Share = 0.1
    different: Positive = 0.3
    exclude: Lines = ()


class TrajectoryConfig(BaseModel):
    """States of the frozen model that training starts from.

    Attributes:
        rollouts: pictures begun, over all concepts.
        retain_rollouts: pictures of retain prompts begun, for function-space retention.
        states: how many states of one rollout are kept.
        steps: sampler steps of a whole rollout.
        size: side of the pictures in pixels.
        guidance_scale: of the rollouts; models that are sampled without guidance do not use it.
        scene_share: share of prompts that show another concept too.
        anchor_share: share of rollouts that follow the anchor prompt.
        keep: keep what was computed on disk after the run, for the next run with these settings.
    """

    model_config = STRICT

    rollouts: Count = 48
    retain_rollouts: Annotated[int, Field(ge=0)] = 0
    states: Count = 6
    steps: Count = 20
    size: Annotated[int, Field(ge=8, multiple_of=8)] = 512
    guidance_scale: Positive = 5.0
    scene_share: Share = 0.35
    anchor_share: Share = 0.3
    batch_size: Count = 8
    keep: bool = False

    @model_validator(mode="after")
    def _states_fit(self) -> TrajectoryConfig:
        if self.states > self.steps:
            raise ValueError(
                f"got {self.states} states from rollouts of {self.steps} steps. "
                "Keep at most as many states as there are steps"
            )
        return self


class ObjectiveName(Enum):
    """How the hypernetwork learns what to write."""

    DIRECT = "direct"
    """Regress predictions onto the anchor's, as far as s / S."""
    JOINT = "joint"
    """As the authors' code: the task loss, and steps that match its gradient."""
    MATCHING = "matching"
    """As the paper's text: steps that match the gradient of the task loss, alone."""
    CLOSED_FORM = "closed-form"
    """Solve for an edit of the text's states a concept, then refine it on trajectories; for models that read the text by cross-attention."""


Eta = Annotated[float | Literal["auto"], PlainValidator(_to_eta)]

OBJECTIVE_SETTINGS: Mapping[str, frozenset[ObjectiveName]] = {
    "full_strength": frozenset({ObjectiveName.DIRECT}),
    "weight_retention": frozenset({ObjectiveName.DIRECT}),
    "function_retention": frozenset({ObjectiveName.DIRECT}),
    "remove_weight": frozenset({ObjectiveName.JOINT, ObjectiveName.MATCHING}),
    "eta": frozenset({ObjectiveName.JOINT, ObjectiveName.MATCHING}),
    "retain_weight": frozenset({ObjectiveName.JOINT, ObjectiveName.MATCHING}),
    "separate_retention": frozenset({ObjectiveName.JOINT}),
    "retain_steps": frozenset({ObjectiveName.JOINT}),
    "retain_lr": frozenset({ObjectiveName.JOINT}),
    "sentences": frozenset({ObjectiveName.CLOSED_FORM}),
    "scenes": frozenset({ObjectiveName.CLOSED_FORM}),
    "preserved": frozenset({ObjectiveName.CLOSED_FORM}),
    "preserve": frozenset({ObjectiveName.CLOSED_FORM}),
    "identity": frozenset({ObjectiveName.CLOSED_FORM}),
    "refine": frozenset({ObjectiveName.CLOSED_FORM}),
    "hold": frozenset({ObjectiveName.CLOSED_FORM}),
}
"""Which objectives a setting belongs to; those that are not here belong to all."""
OBJECTIVE_DEFAULTS: Mapping[ObjectiveName, Mapping[str, object]] = {
    ObjectiveName.MATCHING: {"eta": "auto"},
    ObjectiveName.CLOSED_FORM: {"negative_guidance": 0.1},
}
"""Where an objective has other defaults than the rest."""
EDITS_DEFAULTS: Mapping[str, object] = {
    "architecture": Architecture.EDITS,
    "rank": 4,
    "hidden_dim": 64,
}
"""Of the network, where the objective is ``closed-form``."""
REFINING_STEPS, REFINING_ROLLOUTS = 60, 20
"""There, for one concept: what is refined is nearly right already."""
REFINING_LR = 5e-3
"""There, in units of what it moves."""
MORE_STEPS, MORE_ROLLOUTS = 0.4, 0.42
"""Powers of the number of concepts by which both grow."""
GATES: Mapping[int, Mapping[str, float]] = {
    0: {"least_strength": 0.5},
    1: {"threshold_position": 0.15},
    4: {"threshold_position": 0.0, "false_fire_rate": 0.15},
    16: {"false_fire_rate": 0.5},
}
"""Of the gate, there where there are more concepts than so many, and what fewer have where nothing else is said."""
POSITIVES, NEGATIVES = 96, 40
"""Prompts for the gate's training by which each concept lets them grow: of positives all, of negatives from the second concept on."""


class ObjectiveConfig(BaseModel):
    """The loss.

    Attributes:
        negative_guidance: how far beyond the anchor to push, gamma (0.1 by default of ``closed-form``).
        full_strength: share of samples at s = S; the others draw s uniformly.
        weight_retention: factor of the squared LoRA norm of retain prompts.
        retain_batch_size: retain embeddings a step.
        function_retention: factor of the squared change of predictions for retain prompts.
        remove_weight: factor of the squared distance between steps and eta times the gradient.
        eta: length of a simulated step, or ``auto``: the one real gradient descent does best with (default of ``matching``).
        retain_weight: factor of the squared distance that retain prompts move.
        separate_retention: retention has an optimizer of its own.
        retain_steps: its steps after each of the other's.
        retain_lr: its learning rate; that of ``train`` by default.
        sentences: templates with one slot that each phrase is put in.
        scenes: sentences that each phrase shares with a retain phrase.
        preserved: retain phrases whose states are held, at most.
        preserve: factor of their mean squared change.
        identity: factor of the squared size of an edit, relative to the mean squared distance of its states from the anchor's.
        refine: train the solution further, on trajectories, so that what the model draws is the anchor and not just near it.
        hold: factor of what refining makes of the states of what stays, relative to the solution's, in units of the erase loss
            without LoRA.
    """

    model_config = STRICT

    name: Annotated[ObjectiveName, Field(strict=False)] = ObjectiveName.DIRECT
    negative_guidance: Number = 1.0
    full_strength: Share = 0.25
    weight_retention: Number = 1e-3
    retain_batch_size: Count = 64
    function_retention: Number = 0.0
    remove_weight: Number = 10.0
    eta: Eta = 1e-4
    retain_weight: Number = 1.0
    separate_retention: bool = True
    retain_steps: Count = 1
    retain_lr: Positive | None = None
    sentences: Count = 24
    scenes: Annotated[int, Field(ge=0)] = 8
    preserved: Count = 1000
    preserve: Number = 1.0
    identity: Positive = 0.03
    refine: bool = True
    hold: Number = 0.02

    @model_validator(mode="before")
    @classmethod
    def _settings_belong_to_it(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        try:
            name = ObjectiveName(data.get("name", ObjectiveName.DIRECT))
        except ValueError:
            return data  # the field will say what is wrong
        for key in data:
            owners = OBJECTIVE_SETTINGS.get(key, {name})
            if name not in owners:
                known = " and ".join(sorted(owner.value for owner in owners))
                raise ValueError(
                    f"{key} belongs to {known}, not to {name.value}. Leave it out, or change objective.name"
                )
        return {**OBJECTIVE_DEFAULTS.get(name, {}), **data}

    @model_validator(mode="after")
    def _settings_are_used(self) -> ObjectiveConfig:
        unused = [key for key in type(self).model_fields if not self._uses(key)]
        if given := [key for key in unused if key in self.model_fields_set]:
            raise ValueError(
                f"{given[0]} is of the optimizer that separate_retention: false takes away. Leave one of them out"
            )
        return self

    @model_serializer(mode="wrap")
    def _used_settings(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {key: value for key, value in serialize(self).items() if self._uses(key)}

    def _uses(self, key: str) -> bool:
        """Whether a setting has an effect."""
        separate = self.separate_retention or key not in ("retain_steps", "retain_lr")
        return separate and self.name in OBJECTIVE_SETTINGS.get(key, {self.name})


class OptimizerConfig(BaseModel):
    """Steps, learning rate (linear warmup, then cosine down to ``final_lr`` times ``lr``)."""

    model_config = STRICT

    steps: Count = 300
    batch_size: Count = 8
    lr: Positive = 2e-3
    warmup: Annotated[int, Field(ge=0)] = 10
    final_lr: Share = 0.05
    weight_decay: Number = 0.0
    clip: Positive = 1.0
    ema: OpenShare = 0.0
    save_every: Count = 50


class LogConfig(BaseModel):
    """What a run keeps of its steps beside the pack; training does not depend on it.

    Attributes:
        every: steps between two lines of the metrics file; 0 writes none.
        tensorboard: write the same for TensorBoard, too, if that is installed.
    """

    model_config = STRICT

    every: Annotated[int, Field(ge=0)] = 1
    tensorboard: bool = False


class SamplesConfig(BaseModel):
    """Pictures drawn while training, with LoRA and without; training does not depend on them.

    Attributes:
        prompts: a row of pictures each; none are drawn without.
        every: steps between two grids; the last step has one in any case.
        steps: sampler steps of a picture.
        seed: of their noise.
    """

    model_config = STRICT

    prompts: Lines = ()
    every: Count = 100
    steps: Count = 20
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class TrainConfig(BaseModel):
    """One run. ``retain``, ``retain_captions`` and ``templates`` may name a text file instead of listing.

    Attributes:
        checkpoint: the whole model, or the diffusion model alone.
        text_encoders: their own files, for models that do not come in one.
        vae: its own file; needed for ``samples`` only.
    """

    model_config = STRICT

    checkpoint: FilePath
    text_encoders: FilePaths = ()
    vae: FilePath | None = None
    output: FilePath
    concepts: Annotated[tuple[ConceptConfig, ...], BeforeValidator(to_tuple), Field(min_length=1)]
    retain: PhraseLines
    retain_captions: Lines = Field(default_factory=lambda: read_lines(DATA / "captions.txt"))
    templates: Lines = Field(default_factory=lambda: read_lines(DATA / "templates.txt"))
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    license: str = ""
    network: NetworkConfig = NetworkConfig()
    discovery: DiscoveryConfig = DiscoveryConfig()
    gate: GateConfig = GateConfig()
    trajectories: TrajectoryConfig = TrajectoryConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: OptimizerConfig = OptimizerConfig()
    log: LogConfig = LogConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_objective(cls, data: object) -> object:
        """What depends on the objective and the number of concepts, where nothing else is given."""
        if not isinstance(data, dict):
            return data
        objective, concepts = data.get("objective", {}), data.get("concepts")
        name = (
            objective.get("name", "")
            if isinstance(objective, dict)
            else getattr(objective, "name", None)
        )
        count = len(concepts) if isinstance(concepts, list | tuple) else 1
        defaults = _defaults_of(name, max(1, count))
        own = {section: data.get(section, {}) for section in defaults}
        merged = {
            section: {**defaults[section], **given}
            for section, given in own.items()
            if isinstance(given, dict)
        }
        if (
            merged.get("gate", {}).get("least_strength") == 1
            and "false_fire_rate" not in own["gate"]
        ):
            merged["gate"].pop("false_fire_rate", None)  # what fires in vain would do so whole
        return {**data, **merged}

    @field_validator("output")
    @classmethod
    def _is_safetensors(cls, output: Path) -> Path:
        if output.suffix != ".safetensors":
            raise ValueError(f"got {str(output)!r}, expected a file name ending in .safetensors")
        return output

    @field_validator("templates")
    @classmethod
    def _templates_have_slots(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") not in (1, 2) or re.search(r"[{}]", template.replace("{}", "")):
                raise ValueError(
                    f"template {template!r} must hold {{}} once, or twice for two concepts, and no other braces"
                )
        if {template.count("{}") for template in templates} != {1, 2}:
            raise ValueError(
                "give at least one template with one {} and one with two, for single and paired concepts"
            )
        return templates

    @field_validator("retain")
    @classmethod
    def _retains_something(cls, retain: tuple[str, ...]) -> tuple[str, ...]:
        if not retain:
            raise ValueError(
                "the retain set is empty; without it everything else is erased too. "
                "List phrases that must stay as they are, the closest neighbours of the targets among them"
            )
        return retain

    @model_validator(mode="after")
    def _phrases_are_consistent(self) -> TrainConfig:
        owners: dict[str, str] = {}
        for concept in self.concepts:
            for phrase in concept.target:
                if owners.setdefault(normal(phrase), concept.name) != concept.name:
                    raise ValueError(
                        f"target phrase {phrase!r} belongs to {owners[normal(phrase)]!r} and to {concept.name!r}. "
                        "Leave it in one of them"
                    )
        names = [concept.name for concept in self.concepts]
        if len(set(names)) != len(names):
            raise ValueError(f"concept names must differ, got {', '.join(names)}")
        plurals = {
            form: concept.name
            for concept in self.concepts
            for phrase in concept.target
            for form in forms(phrase)
        }
        for phrase in self.retain:
            own = normal(phrase)
            singular = next((form for form in sorted(forms(phrase)) if form in owners), "")
            owner = owners.get(own) or plurals.get(own) or owners.get(singular)
            if owner is not None:
                what = "also" if own in owners else "in another number"
                raise ValueError(
                    f"retain phrase {phrase!r} is {what} a target phrase of {owner!r}. "
                    "Remove it from one of the two lists, or say in other words what stays"
                )
        edits = self.network.architecture is Architecture.EDITS
        if edits != (self.objective.name is ObjectiveName.CLOSED_FORM):
            raise ValueError(
                f"network.architecture {self.network.architecture.value} does not go with objective.name "
                f"{self.objective.name.value}: edits and closed-form need one another. Leave network.architecture out"
            )
        if self.gate.tokens and self.gate.virtual_negatives:
            raise ValueError(
                "gate.virtual_negatives moves whole prompts, and gate.tokens reads every token. Set gate.tokens to false, or leave the other out"
            )
        if self.objective.function_retention and not self.trajectories.retain_rollouts:
            raise ValueError(
                "objective.function_retention needs states of retain prompts: "
                "set trajectories.retain_rollouts to at least 1"
            )
        return self

    def retained_mentions(self) -> dict[str, str]:
        """Retain phrases that hold a target phrase as whole words, as "hot dog" holds "dog", and that target phrase."""
        targets = [phrase for concept in self.concepts for phrase in concept.target]
        return {
            kept: next(phrase for phrase in targets if mentions(kept, [phrase]))
            for kept in self.retain
            if mentions(kept, targets)
        }

    def parts_of_targets(self) -> dict[str, str]:
        """Last words of target phrases, as "dog" of "hot dog", that no target is and no retain phrase holds, and that target phrase.

        Words with a capital are left out: a surname may well ask for its bearer.
        """
        targets = [phrase for concept in self.concepts for phrase in concept.target]
        kept = " , ".join(self.retain)
        last = {phrase.split()[-1]: phrase for phrase in reversed(targets) if " " in phrase.strip()}
        return {
            word: phrase
            for word, phrase in reversed(last.items())
            if word.isalpha()
            and word.islower()
            and not mentions(word, targets)
            and not mentions(kept, [word])
        }

    def plain(self) -> dict[str, object]:
        """The config as plain data, every list written out."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """A hash of everything that the result depends on."""
        result = self.model_dump(mode="json", exclude={"output", "vae", "log", "samples"})
        result = settle_files(result)
        text = json.dumps(result, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def settle_files(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings to be hashed: the order of text encoders' files does not matter, and where there are none they are not named."""
    files = sorted(settings.pop("text_encoders", ()))
    return {**settings, "text_encoders": files} if files else settings


def in_closed_form(config: TrainConfig, *, own_length: bool = False) -> TrainConfig:
    """The same run with the objective ``closed-form`` and what else is default there; what of gate, rollouts and optimizer was set stays.

    Args:
        own_length: take its rollouts, steps and learning rate even so, where the config's are for LoRAs that begin with nothing.
    """
    count = len(config.concepts)
    defaults, anew = _defaults_of(ObjectiveName.CLOSED_FORM, count), _defaults_of("", count)
    update = {
        "network": NetworkConfig.model_validate(EDITS_DEFAULTS),
        "objective": ObjectiveConfig(name=ObjectiveName.CLOSED_FORM),
        "gate": _with_defaults(config.gate, GateConfig(), defaults["gate"]),
    }
    for name, kind in (("trajectories", TrajectoryConfig), ("train", OptimizerConfig)):
        given = getattr(config, name)
        plain = given if own_length else kind.model_validate(anew[name])
        update[name] = _with_defaults(given, plain, defaults[name])
    return config.model_copy(update=update)


def for_whole_lora(gate: GateConfig, num_concepts: int) -> GateConfig:
    """Settings for a pack that writes all of its LoRA wherever it fires: no more may do so in vain than elsewhere, unless that was set."""
    lenient = _defaults_of(ObjectiveName.CLOSED_FORM, num_concepts)["gate"].get("false_fire_rate")
    if gate.false_fire_rate != lenient:
        return gate
    return gate.model_copy(update={"false_fire_rate": GateConfig().false_fire_rate})


def _defaults_of(objective: object, num_concepts: int) -> Mapping[str, Mapping[str, object]]:
    """Settings of sections that depend on the objective's name, empty for its default, or on the number of concepts."""
    rollouts, steps = num_concepts**MORE_ROLLOUTS, num_concepts**MORE_STEPS
    plain = GateConfig()
    prompts = {
        "num_positives": max(plain.num_positives, POSITIVES * num_concepts),
        "num_negatives": plain.num_negatives + NEGATIVES * (num_concepts - 1),
    }
    if objective in (ObjectiveName.CLOSED_FORM, ObjectiveName.CLOSED_FORM.value):
        # A weak edit on a prompt that asks for nothing erased changes little, and many concepts' synonyms are hard to hear.
        gates = [settings for few, settings in GATES.items() if num_concepts > few]
        return {
            "network": EDITS_DEFAULTS,
            "gate": prompts | {key: value for settings in gates for key, value in settings.items()},
            "trajectories": {"rollouts": round(REFINING_ROLLOUTS * rollouts)},
            "train": {"steps": round(REFINING_STEPS * steps), "lr": REFINING_LR},
        }
    if objective in ("", ObjectiveName.DIRECT, ObjectiveName.DIRECT.value):
        return {
            "gate": prompts,
            "trajectories": {"rollouts": round(TrajectoryConfig().rollouts * rollouts)},
            "train": {"steps": round(OptimizerConfig().steps * steps)},
        }
    return {"gate": prompts}


Section = TypeVar("Section", bound=BaseModel)


def _with_defaults(given: Section, plain: Section, defaults: Mapping[str, object]) -> Section:
    """A section with other defaults than the plain one's where nothing else was given."""
    untold = {
        key: value for key, value in defaults.items() if getattr(given, key) == getattr(plain, key)
    }
    return given.model_copy(update=untold)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML config; ``overrides`` are ``key.key=value`` and win over the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no config file {path}. Give the path of a YAML file."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a text file ({type(error).__name__})."
        ) from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{path}{line} is not valid YAML: {problem}.") from error
    if not isinstance(data, dict):
        got = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(
            f"{path} holds {got}, expected keys with values. Known keys: {', '.join(TrainConfig.model_fields)}."
        )
    refuse_repeated_keys(tree, path)
    return make_config(data, overrides, source=Source(path, tree))


class Source:
    """Where a config comes from, to name file and line in errors."""

    def __init__(self, path: Path | None = None, tree: yaml.Node | None = None) -> None:
        self.path = path
        self.tree = tree
        self.overridden: list[tuple[str | int, ...]] = []

    def place(self, location: Sequence[str | int]) -> str:
        """ " in FILE, line N", " given with --set", or nothing."""
        if any(tuple(location[: len(keys)]) == keys for keys in self.overridden):
            return " given with --set"
        if self.path is None:
            return ""
        line = _line(self.tree, location)
        return f" in {self.path}, line {line}" if line else f" in {self.path}"


def make_config(
    data: Mapping[str, object], overrides: Sequence[str] = (), *, source: Source | None = None
) -> TrainConfig:
    """Check plain data; see :func:`load_config` for ``overrides``."""
    source = source or Source()
    merged = json.loads(json.dumps(data, default=str))
    for override in overrides:
        source.overridden.append(_override(merged, override))
    _look_up_concepts(merged, source)
    try:
        return TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, source, TrainConfig, "config")) from error


def _look_up_concepts(data: dict[str, object], source: Source) -> None:
    """Replace concepts given by name with their entry in ``concept_file``."""
    library_path = data.pop("concept_file", None)
    concepts = data.get("concepts")
    if not isinstance(concepts, list) or not any(isinstance(entry, str) for entry in concepts):
        return
    if not isinstance(library_path, str):
        name = next(entry for entry in concepts if isinstance(entry, str))
        raise ConfigError(
            f"concepts{source.place(('concepts',))} refers to {name!r} by name, but there is no concept_file. "
            "Set concept_file to a YAML file of concepts, or write out name, target and anchor."
        )
    try:
        library = yaml.safe_load(Path(library_path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"concept_file {library_path!r}{source.place(('concept_file',))} cannot be read "
            f"({type(error).__name__}). Give a YAML file of concepts: name: {{target: [...], anchor: ...}}."
        ) from error
    if not isinstance(library, dict):
        raise ConfigError(
            f"concept_file {library_path!r} must hold name: {{target: [...], anchor: ...}}."
        )
    for index, entry in enumerate(concepts):
        if isinstance(entry, str):
            if not isinstance(library.get(entry), dict):
                raise ConfigError(
                    f"concepts.{index}{source.place(('concepts', index))} is {entry!r}, which {library_path} "
                    f"does not hold. {_suggest(entry, [str(name) for name in library])}"
                )
            concepts[index] = {"name": entry, **library[entry]}


def _override(data: dict[str, object], override: str) -> tuple[str | int, ...]:
    """Write one ``key.key=value`` into ``data`` and return its keys."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set needs key=value, for example train.lr=1e-4; got {override!r}.")
    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: the value {text!r} is not valid YAML.") from error
    keys: list[str | int] = [int(key) if key.isdigit() else key for key in path.strip().split(".")]
    place: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, dict) and isinstance(key, str):
            if last:
                place[key] = value
            place = place.setdefault(key, {})
        elif isinstance(place, list) and isinstance(key, int) and key < len(place):
            if last:
                place[key] = value
            place = place[key]
        else:
            parent = ".".join(map(str, keys[:depth])) or "the config"
            raise ConfigError(f"--set {path}: {parent} has no entry {key!r} to change.")
    return tuple(keys)


def refuse_repeated_keys(node: yaml.Node | None, path: Path) -> None:
    """YAML would silently let the last one win."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"Key {key.value!r} stands twice in {path}, on lines {lines[key.value]} and {line}. Keep one."
                )
            lines[key.value] = line
            refuse_repeated_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            refuse_repeated_keys(value, path)


def _line(node: yaml.Node | None, location: Sequence[str | int]) -> int | None:
    """The line of the deepest part of ``location`` that the file has."""
    line = None
    for key in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == key), None)
            if found is None:
                break
            key_node, node = found
            line = _number(key_node)
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = _number(node)
        else:
            break
    return line


def _number(node: yaml.Node | None) -> int | None:
    """The line a node starts in, from 1."""
    return node.start_mark.line + 1 if node and node.start_mark else None


def _suggest(wrong: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Known: {', '.join(known)}.{hint}"


def _fields_at(location: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """The keys of the section at ``location``."""
    section = root
    for key in location:
        if isinstance(key, str) and key in section.model_fields:
            annotation = section.model_fields[key].annotation
            for option in (annotation, *get_args(annotation)):
                if isinstance(option, type) and issubclass(option, BaseModel):
                    section = option
    names = list(section.model_fields)
    return [*names, "concept_file"] if section is TrainConfig else names


EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section with keys",
    "enum": "one of {expected}",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "is_instance_of": "a file name",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "model_type": "a section with keys",
    "multiple_of": "a multiple of {multiple_of}",
    "path_type": "a file name",
    "string_pattern_mismatch": "text that is not blank",
    "string_too_short": "text that is not blank",
    "string_type": "text",
    "too_short": "at least {min_length} entry",
    "tuple_type": "a list",
}


def explain(error: ValidationError, source: Source, root: type[BaseModel], name: str) -> str:
    """What a schema found, one sentence a problem.

    Args:
        root: the whole file's schema.
        name: what to call the whole file.
    """
    details = error.errors(include_url=False)
    return "\n".join(dict.fromkeys(_sentence(detail, source, root, name) for detail in details))


def _sentence(
    detail: Mapping[str, object], source: Source, root: type[BaseModel], name: str
) -> str:
    """One problem that a schema found."""
    location = detail["loc"]
    kind, value = str(detail["type"]), detail.get("input")
    context = detail.get("ctx") or {}
    if not isinstance(location, tuple) or not isinstance(context, dict):
        return str(detail["msg"])
    key = ".".join(map(str, location))
    place = source.place(location)
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1], root)
        return f"Unknown key {key!r}{place}. {_suggest(str(location[-1]), known)}"
    if kind == "missing":
        parent = ".".join(map(str, location[:-1])) or f"the {name}"
        known = ", ".join(_fields_at(location[:-1], root))
        return f"Key {key!r} is missing{source.place(location[:-1])}; {parent} needs it. Known: {known}."
    if kind == "value_error":
        text = str(context.get("error", detail["msg"]))
        return f"{key}{place}: {text}." if key else f"The {name}{place}: {text}."
    expected = EXPECTED.get(kind, str(detail["msg"])).format(**context)
    return f"{key}{place} is {value!r}, expected {expected}."
