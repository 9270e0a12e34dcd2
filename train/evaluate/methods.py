"""The methods that ``compare`` puts side by side: each trains on a task and returns an eraser."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from unhype import checkpoint
from unhype.hypernetwork import Architecture, Hypernetwork
from unhype.lora import LoRAFactors

from ..config import (
    DiscoveryConfig,
    GateConfig,
    NetworkConfig,
    ObjectiveConfig,
    ObjectiveName,
    TrainConfig,
    in_closed_form,
)
from ..loop import Event
from ..prompts import forget_prompts, retain_prompts, split_vocabulary
from ..run import train
from ..trajectories import Pool, Tick, collect
from .alone import alone
from .base import PictureModel
from .baselines import Ground, edit_closed_form, train_similarity, train_static
from .erasers import Eraser, NoEraser, PackEraser, SimilarityEraser, StaticEraser, Written, at_ends

HALF = 2
"""Bytes of a number in half precision, as LoRA files hold it."""
JOINT_RANK, JOINT_HIDDEN = 1, 100
"""The authors' sizes for objects; for several concepts they use 6 and 512."""
JOINT_MANY_RANK, JOINT_MANY_HIDDEN = 6, 512

EVERY_WORD = 50_000
"""More than a text encoder knows."""
UNREAD_GATE = GateConfig(steps=1, num_positives=300, num_negatives=2000, tokens=False)
"""Of a pack whose gate is not asked: as good as no time."""
ADVERSARIAL = 12.0
"""Radius in standardized embedding space, whose vectors are about 28 long; by default of closed form half of it."""


@dataclass(frozen=True)
class Trained:
    """A method's result: what it does, how long it took to get it, and how large its file is."""

    eraser: Eraser
    seconds: float
    bytes: int


@dataclass
class Workshop:
    """A task, the model, and the trajectories that several methods share.

    Attributes:
        folder: where packs are written.
        report: told of what goes on.
    """

    config: TrainConfig
    model: PictureModel
    folder: Path
    report: Callable[[Event], None]
    collect_seconds: dict[str, float] = field(default_factory=dict)

    def tick(self, stage: str) -> Tick:
        """Progress of one stage."""
        return lambda step, total: self.report(Event(stage, step, total))

    @cached_property
    def forget(self) -> Pool:
        """States of prompts that ask for a concept."""
        config = self.config
        rng = random.Random(f"unhype pool {config.seed}")
        prompts = forget_prompts(config, config.trajectories.rollouts, rng=rng)
        return self._collect("forget", [(p.text, p.anchor) for p in prompts], config.seed)

    @cached_property
    def retain(self) -> Pool:
        """States of as many retain prompts."""
        config = self.config
        rng = random.Random(f"unhype pool to keep {config.seed}")
        words, _ = split_vocabulary(config, rng=rng)
        prompts = retain_prompts(config, words, config.trajectories.rollouts, rng=rng)
        return self._collect("retain", [(p, p) for p in prompts], config.seed + 1)

    def ground(self, *, retention: bool) -> Ground:
        """What a baseline learns from."""
        return Ground(self.config, self.model, self.forget, self.retain if retention else None)

    def seconds_of(self, *, retention: bool) -> float:
        """How long collecting that took."""
        names = ("forget", "retain") if retention else ("forget",)
        return sum(self.collect_seconds[name] for name in names)

    def pack(self, name: str, config: TrainConfig) -> tuple[checkpoint.Pack, float]:
        """Train a pack; it, and the seconds."""
        path = self.folder / f"{name}.safetensors"
        config = config.model_copy(update={"output": path})
        with alone():  # other processes have tasks of their own
            result = train(config, progress=self.report, denoiser=self.model)
        return checkpoint.load(path), result.seconds

    def _collect(self, name: str, pairs: list[tuple[str, str]], seed: int) -> Pool:
        begin = time.monotonic()
        tick = self.tick(f"collecting trajectories ({name})")
        pool = collect(self.model, pairs, self.config.trajectories, seed=seed, tick=tick)
        self.collect_seconds[name] = time.monotonic() - begin
        return pool


@dataclass(frozen=True)
class UngatedEraser:
    """A hypernetwork alone, as the authors use it: every prompt gets what it writes."""

    hypernetwork: Hypernetwork

    @torch.no_grad()
    def write(self, embedding: Tensor) -> Written:
        every = torch.ones(len(embedding), dtype=torch.bool)
        return Written(self.hypernetwork.generate(at_ends(embedding)), every)


Method = Callable[[Workshop], Trained]


def nothing(_: Workshop) -> Trained:
    """The model as it is."""
    return Trained(NoEraser(), 0.0, 0)


def static(shop: Workshop) -> Trained:
    """One LoRA, nothing held."""
    return _static(shop, retention=False)


def static_retention(shop: Workshop) -> Trained:
    """One LoRA, predictions for retain prompts held."""
    return _static(shop, retention=True)


def _static(shop: Workshop, *, retention: bool) -> Trained:
    ground = shop.ground(retention=retention)
    begin = time.monotonic()
    eraser = train_static(ground, tick=shop.tick("training a static LoRA"))
    seconds = time.monotonic() - begin + shop.seconds_of(retention=retention)
    return Trained(eraser, seconds, _lora_bytes(eraser.factors))


def closed_form(shop: Workshop) -> Trained:
    """UCE."""
    begin = time.monotonic()
    eraser: StaticEraser = edit_closed_form(shop.config, shop.model)
    size = sum(t.in_features * t.out_features for t in shop.model.targets) * HALF
    return Trained(eraser, time.monotonic() - begin, size)


def similarity(shop: Workshop) -> Trained:
    """SPM's idea: a LoRA a concept, gated by similarity."""
    ground = shop.ground(retention=False)
    begin = time.monotonic()
    eraser: SimilarityEraser = train_similarity(ground, tick=shop.tick("training LoRA a concept"))
    seconds = time.monotonic() - begin + shop.seconds_of(retention=False)
    return Trained(eraser, seconds, _lora_bytes(eraser.loras))


def joint(shop: Workshop) -> Trained:
    """The authors' code's objective and architecture, without a gate; on our trajectories, batched."""
    many = len(shop.config.concepts) > 1
    network = NetworkConfig(
        architecture=Architecture.HEADS,
        rank=JOINT_MANY_RANK if many else JOINT_RANK,
        hidden_dim=JOINT_MANY_HIDDEN if many else JOINT_HIDDEN,
    )
    config = shop.config.model_copy(
        update={
            "network": network,
            "objective": ObjectiveConfig(name=ObjectiveName.JOINT),
            "gate": UNREAD_GATE,
        }
    )
    pack, seconds = shop.pack("joint", config)
    size = sum(p.numel() for p in pack.hypernetwork.state_dict().values()) * HALF
    return Trained(UngatedEraser(pack.hypernetwork), seconds, size)


def ours(shop: Workshop) -> Trained:
    """Edits in closed form, behind a gate."""
    return _ours(shop, "ours", in_closed_form(shop.config, own_length=True))


def ours_direct(shop: Workshop) -> Trained:
    """A hypernetwork of atoms, trained on trajectories, behind the same gate."""
    return _ours(shop, "direct", shop.config)


def ours_discovery(shop: Workshop) -> Trained:
    """The same, and the model is asked for further words; none is withheld from it, asked questions' words included."""
    discovery = DiscoveryConfig(words=EVERY_WORD)
    config = in_closed_form(shop.config, own_length=True)
    return _ours(shop, "discovery", config.model_copy(update={"discovery": discovery}))


def ours_adversarial(shop: Workshop) -> Trained:
    """The same, with a gate trained on embeddings moved twice as far against it."""
    config = in_closed_form(shop.config, own_length=True)
    gate = config.gate.model_copy(update={"adversarial": ADVERSARIAL})
    return _ours(shop, "adversarial", config.model_copy(update={"gate": gate}))


def _ours(shop: Workshop, name: str, config: TrainConfig) -> Trained:
    pack, seconds = shop.pack(name, config)
    return Trained(PackEraser(pack), seconds, (shop.folder / f"{name}.safetensors").stat().st_size)


def _lora_bytes(factors: LoRAFactors) -> int:
    return sum(t.numel() for t in (*factors.down, *factors.up)) * HALF


METHODS: Mapping[str, Method] = {
    "none": nothing,
    "static": static,
    "static+retention": static_retention,
    "closed-form": closed_form,
    "similarity-gated": similarity,
    "joint heads": joint,
    "ours": ours,
    "ours direct": ours_direct,
    "ours+discovery": ours_discovery,
    "ours+adversarial": ours_adversarial,
}
"""In the order of the table."""
