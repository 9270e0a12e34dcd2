"""The pack: one self-describing ``.safetensors`` with hypernetwork, gate and everything needed to use them.

``docs/checkpoint.md`` describes every key.
"""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .embedding import heard, last_heard
from .families import FAMILIES, FamilySpec, family
from .gate import SILENT, Gate, GateConfig, Reading, check_threshold
from .hypernetwork import Hypernetwork, HypernetworkConfig, make_hypernetwork
from .lora import LoRAFactors, TargetModule, combine

FORMAT = 4
FORMAT_KEY = "unhype.format"
CONFIG_KEY = "unhype.config"
HYPERNETWORK, GATE = "hypernetwork.", "gate."
ENOUGH = 0.5
"""Of how far the surest concept's logit lies beyond the threshold: from there on another is asked for beside it."""
STORED = torch.float16
"""Precision of the hypernetwork's weights on disk; the gate and all statistics stay in single precision."""


class CheckpointError(ValueError):
    """A file is not a pack that this version can use."""


@dataclass(frozen=True)
class BaseFingerprint:
    """The model a pack was trained on.

    Attributes:
        name: its file name.
        digest: hash of its target modules' weights, to tell the same model from a relative.
    """

    name: str
    digest: str


@dataclass(frozen=True)
class ConceptInfo:
    """One erased concept: the phrases that name it, and the phrase drawn in its place."""

    name: str
    target: tuple[str, ...]
    anchor: str


@dataclass(frozen=True)
class Calibration:
    """How the gate's threshold was chosen.

    Attributes:
        false_fire_rate: share of ordinary prompts, kept out of training, that fire.
        miss_rate: share of target prompts, kept out of training, that do not.
        num_negatives: how many ordinary prompts there were.
        num_positives: how many target prompts there were.
    """

    false_fire_rate: float
    miss_rate: float
    num_negatives: int
    num_positives: int


@dataclass(frozen=True)
class PackInfo:
    """Everything a pack says of itself, as its metadata holds it.

    Attributes:
        training: the resolved configuration of the run.
        training_digest: hash of it.
        metrics: figures measured after training, by name.
        version: of the tool that wrote the file.
    """

    family: str
    base: BaseFingerprint
    hypernetwork: HypernetworkConfig
    targets: tuple[TargetModule, ...]
    gate: GateConfig
    concepts: tuple[ConceptInfo, ...]
    calibration: Calibration | None = None
    training: dict[str, Any] = field(default_factory=dict)
    training_digest: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    license: str = ""

    @property
    def spec(self) -> FamilySpec:
        """The entry of the pack's family."""
        return family(self.family)

    @property
    def concept_names(self) -> tuple[str, ...]:
        """Names of the concepts, in the order of the gate's outputs."""
        return tuple(concept.name for concept in self.concepts)


@dataclass(frozen=True)
class Generated:
    """LoRA factors for a batch of prompts, and what the gate read in each; ``factors.scale`` is 0 where nothing fired.

    Attributes:
        shares: how much of its LoRA is written for each concept, (batch, concepts) in [0, 1]; 0 also where one fires and leaves
            it to another that is surer.
        chunks: factors for every 77 tokens of one long prompt, where each can have its own.
    """

    factors: LoRAFactors
    reading: Reading
    shares: Tensor
    chunks: LoRAFactors | None = None


@dataclass(frozen=True)
class Pack:
    """A loaded pack.

    Attributes:
        active: which concepts may fire.
        threshold: of the gate, in place of the calibrated one.
        name: file name, for messages.
        graded: whether less is written where the gate is less sure, if the pack asks for that.
    """

    info: PackInfo
    hypernetwork: Hypernetwork
    gate: Gate
    active: tuple[bool, ...] = ()
    threshold: float | None = None
    name: str = "pack"
    graded: bool = True

    def __post_init__(self) -> None:
        if not self.active:
            object.__setattr__(self, "active", (True,) * len(self.info.concepts))

    def only(self, names: Sequence[str]) -> Pack:
        """The same pack with just these concepts active.

        Raises:
            ValueError: the pack has no concept of that name.
        """
        unknown = [name for name in names if name not in self.info.concept_names]
        if unknown:
            raise ValueError(
                f"{self.name} has no concept {unknown[0]!r}. It erases: {', '.join(self.info.concept_names)}."
            )
        return replace(self, active=tuple(name in names for name in self.info.concept_names))

    def at(self, threshold: float) -> Pack:
        """The same pack with another threshold of its gate; ``ValueError`` if that is no probability."""
        return replace(self, threshold=check_threshold(threshold))

    @torch.no_grad()
    def read(self, embedding: Tensor) -> Reading:
        """What the gate says of each prompt.

        Args:
            embedding: (batch, embedding_dim), or of all tokens, (batch, tokens, embedding_dim); of these a gate that reads
                ends takes the last.
        """
        if not torch.isfinite(embedding).all():
            raise ValueError(
                "The prompt's embedding holds values that are not finite numbers. "
                "Check the text encoder: a checkpoint with missing or damaged weights does this."
            )
        return self.gate.read(self._known(embedding), threshold=self.threshold, active=self.active)

    @torch.no_grad()
    def generate(self, embedding: Tensor, *, s: float | None = None) -> Generated:
        """Write the LoRA of each prompt, the less of it the less sure the gate is; those for which nothing fires get scale 0.

        Args:
            embedding: as for ``read``.
            s: position on the trajectory in [0, S]; S, fully erased, by default.
        """
        embedding = self._known(embedding)
        if embedding.dim() == 3:
            counts = heard(embedding).sum(1).clamp(min=1).tolist()
            rows = [self.write(v[:count], s=s) for v, count in zip(embedding, counts, strict=True)]
            return Generated(stack(rows), *gather(rows))
        reading = self.read(embedding)
        factors, strength = self.hypernetwork.generate(embedding, s), self._strength(reading)
        shares = reading.fired * strength[:, None]
        return Generated(factors.scaled(strength.to(factors.scale)), reading, shares)

    @torch.no_grad()
    def write(self, vectors: Tensor, *, s: float | None = None) -> Written:
        """The LoRA of one text from all vectors that are read of it, (n, embedding_dim).

        Each concept that fires takes the vector at which it does most surely, and the factors written for those vectors add up.
        Where a gate reads every token, a concept acts only if no other is surer at that vector, and if it is at least half as
        far beyond the threshold as the surest and sure enough to be written whole. Vectors of zeros ask for nothing.
        """
        says = heard(vectors)
        reading = self.read(vectors)
        probability = reading.probability.masked_fill(~says[:, None], 0)
        fires = (reading.fired & says[:, None]).any(0)
        surest = probability.argmax(0)
        acting = fires & self._stands_out(vectors[surest]) if self.gate.config.tokens else fires
        chosen = surest[acting].unique() if fires.any() else probability.amax(1).argmax()[None]
        generated = self.hypernetwork.generate(vectors[chosen], s)
        strength = self._strength(reading) * says
        generated = generated.scaled(strength[chosen].to(generated.scale))
        parts = tuple(generated.rows([index]) for index in range(len(chosen)))
        return Written(parts, Reading(probability.amax(0), fires), strength[surest] * acting)

    def _strength(self, reading: Reading) -> Tensor:
        """How much of each prompt's LoRA is written, (batch,): nothing where nothing fires."""
        surest = reading.probability.masked_fill(~reading.fired, 0).amax(1)
        return self.strength(surest) * reading.open

    def strength(self, probability: Tensor) -> Tensor:
        """How much of the LoRA is written for what fires with these probabilities, of any shape; see :meth:`Gate.strength`."""
        return self.gate.strength(probability) if self.graded else torch.ones_like(probability)

    def _stands_out(self, surest: Tensor) -> Tensor:
        """Which concepts, (concepts,) of bool, stand out at the vectors (concepts, embedding_dim) at which they are surest."""
        threshold = self.gate.config.threshold if self.threshold is None else self.threshold
        active = torch.tensor(self.active, device=surest.device)
        logits = self.gate(surest).masked_fill(~active, SILENT)
        own = logits.diagonal()
        beyond = own - math.log(threshold / (1 - threshold))
        beside = (beyond >= ENOUGH * beyond.max()) & (self.strength(own.sigmoid()) >= 1)
        return (own >= logits.amax(1)) & (beside | (own >= own.max()))

    def _known(self, embedding: Tensor) -> Tensor:
        """As the gate reads it."""
        ends_only = embedding.dim() == 3 and not self.gate.config.tokens
        return last_heard(embedding) if ends_only else embedding


@dataclass(frozen=True)
class Written:
    """The factors that one text's LoRA is the sum of, what fired for it, and each concept's share, (concepts,) each."""

    parts: tuple[LoRAFactors, ...]
    reading: Reading
    shares: Tensor


def gather(rows: Sequence[Written]) -> tuple[Reading, Tensor]:
    """What fired, and each concept's share, (rows, concepts) each."""
    reading = Reading(
        torch.stack([row.reading.probability for row in rows]),
        torch.stack([row.reading.fired for row in rows]),
    )
    return reading, torch.stack([row.shares for row in rows])


def stack(rows: Sequence[Written]) -> LoRAFactors:
    """The sum of each text's parts, one row each."""
    first = rows[0].parts[0]
    single = len(rows) == len(rows[0].parts) == 1
    return first if single else combine([row.parts for row in rows], first.targets)


def save(path: Path, info: PackInfo, hypernetwork: Hypernetwork, gate: Gate) -> None:
    """Write a pack; it appears under its name only when whole."""
    tensors = {
        HYPERNETWORK + name: value if name.startswith("standardize.") else value.to(STORED)
        for name, value in hypernetwork.state_dict().items()
    } | {GATE + name: value for name, value in gate.state_dict().items()}
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"{broken[0]} holds values that are not finite, or too large for half precision; "
            f"{path} was not written. Training has diverged: lower the learning rate."
        )
    metadata = {
        FORMAT_KEY: str(FORMAT),
        CONFIG_KEY: json.dumps(to_plain(info)),
        "modelspec.title": f"UnHype: {', '.join(info.concept_names)} erased",
        "modelspec.architecture": f"unhype/{info.family}",
        "modelspec.license": info.license,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            part,
            metadata,
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_info(path: Path) -> PackInfo:
    """What a pack says of itself, without its weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, foreign, of a newer format, or of a family unknown here.
    """
    with _open(path) as file:
        return _parse(path, file.metadata() or {})


def load(path: Path, device: torch.device | str = "cpu") -> Pack:
    """Read a pack, ready to generate.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, foreign, of a newer format or an unknown family, or its tensors do
            not fit its description.
    """
    with _open(path) as file:
        info = _parse(path, file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.random.fork_rng(devices=[]):
        hypernetwork, gate = make_hypernetwork(info.hypernetwork, info.targets), Gate(info.gate)
    for prefix, module in ((HYPERNETWORK, hypernetwork), (GATE, gate)):
        _fill(
            path,
            module,
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
        )
    foreign = [name for name in tensors if not name.startswith((HYPERNETWORK, GATE))]
    if foreign:
        raise CheckpointError(
            f"{path.name} holds {foreign[0]!r}, which no UnHype pack has. Train or fetch it again."
        )
    return Pack(
        info,
        hypernetwork.to(device).eval().requires_grad_(False),
        gate.to(device).eval().requires_grad_(False),
        name=path.name,
    )


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no pack {path}. Put packs into ComfyUI's models/unhype, or train one."
        )
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as safetensors ({error}). It is cut short or another kind of file; copy it again."
        ) from error


def _parse(path: Path, metadata: Mapping[str, str]) -> PackInfo:
    if FORMAT_KEY not in metadata or CONFIG_KEY not in metadata:
        raise CheckpointError(
            f"{path.name} is not an UnHype pack: its metadata has no {FORMAT_KEY}. "
            "Load LoRA and model files with their own loaders; packs come from `python -m train.cli train`."
        )
    version = metadata[FORMAT_KEY]
    if not version.isdigit() or int(version) > FORMAT:
        raise CheckpointError(
            f"{path.name} has UnHype format {version}; this pack of nodes reads up to {FORMAT}. Update it."
        )
    try:
        info = from_plain(PackInfo, json.loads(metadata[CONFIG_KEY]))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"The description inside {path.name} is damaged: {error} Train or fetch it again."
        ) from error
    if info.family not in FAMILIES:
        raise CheckpointError(
            f"{path.name} was made for models of family {info.family!r}; this version knows {', '.join(FAMILIES)}. "
            "Update the nodes."
        )
    _check_agreement(path, info)
    return info


def _check_agreement(path: Path, info: PackInfo) -> None:
    """Refuse a description whose parts contradict one another."""
    dim = info.spec.embedding.dim
    for what, got, expected in (
        ("concepts in its gate", info.gate.num_concepts, len(info.concepts)),
        ("inputs of its gate", info.gate.embedding_dim, dim),
        ("inputs of its hypernetwork", info.hypernetwork.embedding_dim, dim),
    ):
        if got != expected:
            raise CheckpointError(
                f"{path.name} contradicts itself: {got} {what}, expected {expected}. Fetch it again."
            )


def _fill(path: Path, module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    wanted = module.state_dict()
    for word, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("has an extra", tensors.keys() - wanted.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{path.name} {word} tensor {min(names)!r} ({len(names)} in all); it does not fit its own description. "
                "Train or fetch it again."
            )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{path.name}: {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}. Fetch it again."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path.name}: {name} holds values that are not finite. Train or fetch it again."
            )
    module.load_state_dict(dict(tensors))


def to_plain(value: Any) -> Any:
    """Dataclasses and enums as JSON can hold them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: Any, value: Any) -> Any:
    """Read back what ``to_plain`` wrote, as ``kind``; ``ValueError`` where it does not fit."""
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{kind.__name__} must be an object, got {type(value).__name__}.")
        hints = get_type_hints(kind)
        unknown = value.keys() - hints.keys()
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r} in {kind.__name__}.")
        try:
            return kind(**{name: from_plain(hints[name], item) for name, item in value.items()})
        except TypeError as error:
            raise ValueError(f"{kind.__name__} is incomplete: {error}.") from error
    if isinstance(kind, types.UnionType):
        options = get_args(kind)
        return None if value is None and type(None) in options else from_plain(options[0], value)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"expected a list, got {type(value).__name__}.")
        return tuple(from_plain(get_args(kind)[0], item) for item in value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    plain: Any = get_origin(kind) or kind
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ValueError(f"expected {plain.__name__}, got {value!r}.")
    return value
