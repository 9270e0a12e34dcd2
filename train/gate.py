"""Train the gate, and choose its threshold on words that it was not trained with.

The gate needs text embeddings only, so it can see far more prompts than the denoiser could.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unhype.checkpoint import Calibration
from unhype.embedding import heard
from unhype.gate import SILENT, Gate, GateConfig

from .config import TrainConfig
from .prompts import (
    forget_prompts,
    lengthen,
    ordinary_vocabulary,
    retain_prompts,
    scatter,
    split_vocabulary,
)

Embed = Callable[[list[str]], Tensor]
NOTABLE_MISS_RATE = 0.15
READ_AT_ONCE = 256
"""Prompts, of which all tokens are read."""
FARTHEST = 0.5
"""Of the way to a positive that a virtual negative may go."""
HARDEST_FOR, LOOKED_AT, HARDEST = 50, 0.25, 0.1
"""Every so many steps this share of the negatives is looked at, and that share of these counts as the hardest until then."""
log = logging.getLogger("unhype")


@dataclass(frozen=True)
class GateMaterial:
    """Embeddings (prompts, dim) or (prompts, tokens, dim), and of the positives which concept each asks for, (prompts,).

    The held ones are of retain phrases and captions that the others do not use, and of further target prompts.
    """

    positives: Tensor
    concepts: Tensor
    negatives: Tensor
    held_positives: Tensor
    held_concepts: Tensor
    held_negatives: Tensor

    def read_by(self, gate: Gate) -> GateMaterial:
        """With one vector a prompt, (prompts, dim): that at which the gate is surest, of positives of their own concept."""
        return GateMaterial(
            positives=surest(gate, self.positives, self.concepts),
            concepts=self.concepts,
            negatives=surest(gate, self.negatives),
            held_positives=surest(gate, self.held_positives, self.held_concepts),
            held_concepts=self.held_concepts,
            held_negatives=surest(gate, self.held_negatives),
        )


@torch.no_grad()
def surest(gate: Gate, embeddings: Tensor, concepts: Tensor | None = None) -> Tensor:
    """The vector of each prompt (prompts, dim) at which its concept, or any, is likeliest; what has one vector only stays."""
    if embeddings.dim() == 2:
        return embeddings
    chosen = []
    wanted = None if concepts is None else concepts.split(READ_AT_ONCE)
    for index, part in enumerate(embeddings.split(READ_AT_ONCE)):
        logits = gate(part.flatten(0, 1)).unflatten(0, part.shape[:2])
        own = (
            logits.amax(2)
            if wanted is None
            else logits.gather(2, wanted[index][:, None, None].expand(-1, part.shape[1], 1))[..., 0]
        )
        places = own.masked_fill(~heard(part), SILENT).argmax(1)
        chosen.append(part[torch.arange(len(part)), places].float())
    return torch.cat(chosen)


def gather(config: TrainConfig, embed: Embed) -> GateMaterial:
    """Write and embed the gate's prompts."""
    rng = random.Random(f"unhype gate {config.seed}")
    words, held_words = split_vocabulary(config, rng=rng)
    gate = config.gate
    positives = forget_prompts(config, gate.num_positives, rng=rng)
    num_held = max(len(config.concepts), round(gate.num_positives * gate.held_back))
    held_positives = forget_prompts(config, num_held, rng=rng)
    negatives = retain_prompts(config, words, gate.num_negatives, rng=rng)
    num_held = max(50, round(gate.num_negatives * gate.held_back))
    held_negatives = retain_prompts(config, held_words, num_held, rng=rng)
    groups = [
        [p.text for p in positives],
        [p.text for p in held_positives],
        negatives,
        held_negatives,
    ]
    sources = [words, held_words, words, held_words]
    scattered = ordinary_vocabulary(config)

    def disguise(text: str, captions: Sequence[str]) -> str:
        if gate.scatter_share and rng.random() < gate.scatter_share:
            text = scatter(text, scattered, rng)
        return lengthen(text, captions, rng) if rng.random() < gate.long_share else text

    texts = [
        disguise(text, vocabulary.captions)
        for group, vocabulary in zip(groups, sources, strict=True)
        for text in group
    ]
    counts = [len(positives), len(held_positives), len(negatives), len(held_negatives)]
    embedded = embed(texts).cpu().split(counts)
    return GateMaterial(
        positives=embedded[0],
        concepts=torch.tensor([p.concept for p in positives]),
        held_positives=embedded[1],
        held_concepts=torch.tensor([p.concept for p in held_positives]),
        negatives=embedded[2],
        held_negatives=embedded[3],
    )


def train_gate(
    config: TrainConfig, material: GateMaterial, tick: Callable[[int, int], None]
) -> tuple[Gate, Calibration]:
    """Train the gate, then put its threshold at probability 0.5."""
    gate = fit_gate(config, material, tick)
    return gate, calibrate(gate, material, config)


def fit_gate(config: TrainConfig, material: GateMaterial, tick: Callable[[int, int], None]) -> Gate:
    """Train on noisy embeddings, half of them positives; of the negatives, part are those that it hears most at the time."""
    settings = config.gate
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        gate = Gate(
            GateConfig(
                material.positives.shape[-1],
                len(config.concepts),
                settings.hidden_dim,
                tokens=settings.tokens,
                least_strength=settings.least_strength,
                full_strength_at=settings.full_strength_at,
            )
        )
    sides = material.positives, material.negatives
    spoken = [heard(side) for side in sides]
    every = [side[said] for side, said in zip(sides, spoken, strict=True)]
    gate.standardize.fit(torch.cat(every).float())
    optimizer = torch.optim.AdamW(
        gate.layers.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    positives = gate.standardize(sides[0]) if settings.virtual_negatives else sides[0]
    half = settings.batch_size // 2
    num_hard = round(settings.hard_share * (settings.batch_size - half))
    hardest = torch.arange(len(sides[1]))
    for step in range(settings.steps):
        if num_hard and step % HARDEST_FOR == 0:
            hardest = _hardest(gate, sides[1], generator)
        chosen = torch.randint(len(sides[0]), (half,), generator=generator)
        other = torch.randint(len(sides[1]), (settings.batch_size - half,), generator=generator)
        other[:num_hard] = hardest[torch.randint(len(hardest), (num_hard,), generator=generator)]
        own = material.concepts[chosen]
        x = Vectors.of(
            (sides[0][chosen], spoken[0][chosen]), (sides[1][other], spoken[1][other])
        ).seen_by(gate)
        if settings.virtual_negatives:
            x = x.with_virtual(half, positives, settings.virtual_negatives, generator)
        x = x.moved(settings.noise * torch.randn(x.vectors.shape, generator=generator))
        if settings.adversarial:
            x = move_against(gate, x, own, settings.adversarial)
        x = x.only(x.loudest(gate))
        wanted = torch.zeros(x.prompts, len(config.concepts))
        wanted[torch.arange(half), own] = 1
        # One concept's prompts are negatives of the others: weigh the few positives of each up.
        weight = torch.tensor(float(len(config.concepts)))
        loss = F.binary_cross_entropy_with_logits(x.logits(gate), wanted, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick(step + 1, settings.steps)
    return gate.eval()


@dataclass(frozen=True)
class Vectors:
    """All vectors of a batch of prompts, (n, dim), and whose each is, (n,)."""

    vectors: Tensor
    owners: Tensor
    prompts: int

    @staticmethod
    def of(*sides: tuple[Tensor, Tensor]) -> Vectors:
        """Of prompts (prompts, dim) or (prompts, tokens, dim) and which of their vectors say anything, one side after the other."""
        vectors = [side[said] for side, said in sides]
        counts = torch.cat([said.view(len(said), -1).sum(1) for _, said in sides])
        owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return Vectors(torch.cat(vectors).float(), owners, len(counts))

    def seen_by(self, gate: Gate) -> Vectors:
        """Standardized."""
        return replace(self, vectors=gate.standardize(self.vectors))

    def moved(self, by: Tensor) -> Vectors:
        """The same elsewhere, by (n, dim)."""
        return replace(self, vectors=self.vectors + by)

    def logits(self, gate: Gate) -> Tensor:
        """Of each concept the highest of a prompt's, (prompts, concepts)."""
        return self._highest(gate.layers(self.vectors))

    @torch.no_grad()
    def loudest(self, gate: Gate) -> Tensor:
        """Which vectors have the highest logit of their prompt, of any concept: the only ones that ``logits`` and its gradient depend on."""
        every = gate.layers(self.vectors)
        return (every == self._highest(every)[self.owners]).any(1).nonzero()[:, 0]

    def first(self, prompts: int) -> Vectors:
        """Those of the first prompts."""
        count = int((self.owners < prompts).sum())
        return Vectors(self.vectors[:count], self.owners[:count], prompts)

    def only(self, chosen: Tensor) -> Vectors:
        """Some of the vectors, (chosen,)."""
        return replace(self, vectors=self.vectors[chosen], owners=self.owners[chosen])

    def _highest(self, every: Tensor) -> Tensor:
        """Of each prompt and concept, (prompts, concepts), of all logits (n, concepts)."""
        owners = self.owners[:, None].expand_as(every)
        start = every.new_full((self.prompts, every.shape[1]), SILENT)
        return start.scatter_reduce(0, owners, every, "amax")

    def with_virtual(
        self, first: int, positives: Tensor, share: float, generator: torch.Generator
    ) -> Vectors:
        """The same where each prompt is one vector, those from ``first`` on partly virtual."""
        moved = _virtual(self.vectors[first:], positives, share, generator)
        return replace(self, vectors=torch.cat([self.vectors[:first], moved]))


def _hardest(gate: Gate, negatives: Tensor, generator: torch.Generator) -> Tensor:
    """Which negatives, of some looked at, the gate hears most, (hardest,)."""
    order = torch.randperm(len(negatives), generator=generator)
    looked_at = order[: math.ceil(LOOKED_AT * len(order))]
    heard_most = logits_of(gate, negatives[looked_at]).amax(1)
    return looked_at[heard_most.topk(math.ceil(HARDEST * len(looked_at))).indices]


def _virtual(
    negatives: Tensor, positives: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """Negatives (batch, dim), of which ``share`` is moved up to ``FARTHEST`` of the way to random positives."""
    chosen = torch.randint(len(positives), (len(negatives),), generator=generator)
    moved = torch.rand(len(negatives), 1, generator=generator) < share
    way = FARTHEST * torch.rand(len(negatives), 1, generator=generator) * moved
    return negatives + way * (positives[chosen] - negatives)


def move_against(gate: Gate, batch: Vectors, concepts: Tensor, radius: float) -> Vectors:
    """The same where the gate sees the concepts of the first prompts, (positives,), less.

    What it sees them by goes one step of ``radius`` down the gradient; all else stays.
    """
    asking = batch.first(len(concepts))
    chosen = asking.loudest(gate)
    x = asking.only(chosen)
    x = replace(x, vectors=x.vectors.requires_grad_())
    own = x.logits(gate).gather(1, concepts[:, None])
    (slope,) = torch.autograd.grad(own.sum(), x.vectors)
    moved = batch.vectors.index_add(0, chosen, F.normalize(slope, dim=1), alpha=-radius)
    return replace(batch, vectors=moved)


@torch.no_grad()
def logits_of(gate: Gate, embeddings: Tensor) -> Tensor:
    """Logits of any number of prompts, (prompts, concepts)."""
    return torch.cat([gate(part) for part in embeddings.split(READ_AT_ONCE)])


@torch.no_grad()
def calibrate(gate: Gate, material: GateMaterial, config: TrainConfig) -> Calibration:
    """Shift and scale each concept's logit so that its threshold is probability 0.5; measure what then goes wrong.

    Logits are first made comparable: 0 is the median of held-back prompts that must stay silent, 1 of those that must fire. The
    threshold lies ``threshold_position`` of the way from the former (all but ``false_fire_rate`` of them, over all concepts) to the
    latter (all but the faintest twentieth); where the two overlap, silence goes first. What a concept's few loudest silent prompts
    say alone is little, so each meets half-way the threshold that would do for all concepts alike.
    """
    settings = config.gate
    last = gate.layers[-1]
    if not isinstance(last, torch.nn.Linear):
        raise TypeError(f"The gate's last layer must be Linear, got {type(last).__name__}.")
    fire, silent = (
        logits_of(gate, part) for part in (material.held_positives, material.held_negatives)
    )
    own = [fire[material.held_concepts == k, k] for k in range(len(config.concepts))]
    start = silent.median(0).values
    spread = (torch.stack([logits.median() for logits in own]) - start).clamp(min=1)
    quiet = (silent - start) / spread
    alone = torch.quantile(quiet, 1 - settings.false_fire_rate / len(own), dim=0)
    low = (alone + torch.quantile(quiet.amax(1), 1 - settings.false_fire_rate)) / 2
    high = (torch.stack([torch.quantile(logits, 0.05) for logits in own]) - start) / spread
    threshold = start + spread * (low + settings.threshold_position * (high - low).clamp(min=0))
    # Sharpness: halfway between the two groups' medians is a logit of 4 away.
    last.bias.copy_((last.bias - threshold) * 8 / spread)
    last.weight.mul_(8 / spread[:, None])
    fired = gate.read(material.held_positives).fired[
        torch.arange(len(fire)), material.held_concepts
    ]
    miss_rate = 1 - fired.float().mean().item()
    if miss_rate > NOTABLE_MISS_RATE:
        log.warning(
            "The gate misses %.0f%% of held-back prompts that ask for a target. Name its phrases more fully, remove what "
            "is nearly a target from retain, or allow a higher gate.false_fire_rate.",
            100 * miss_rate,
        )
    return Calibration(
        false_fire_rate=gate.read(material.held_negatives).open.float().mean().item(),
        miss_rate=miss_rate,
        num_negatives=len(silent),
        num_positives=len(fire),
    )
