"""Train the gate, and choose its threshold on words that it was not trained with.

The gate needs text embeddings only, so it can see far more prompts than the denoiser could.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unhype.checkpoint import Calibration
from unhype.gate import Gate, GateConfig

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
FARTHEST = 0.5
"""Of the way to a positive that a virtual negative may go."""
log = logging.getLogger("unhype")


@dataclass(frozen=True)
class GateMaterial:
    """Embeddings (prompts, dim), and of the positives which concept each asks for, (prompts,).

    The held ones are of retain phrases and captions that the others do not use, and of further target prompts.
    """

    positives: Tensor
    concepts: Tensor
    negatives: Tensor
    held_positives: Tensor
    held_concepts: Tensor
    held_negatives: Tensor


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
    embedded = embed(texts).float().cpu().split(counts)
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
    """Train on noisy embeddings, half of them positives."""
    settings = config.gate
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        gate = Gate(
            GateConfig(material.positives.shape[1], len(config.concepts), settings.hidden_dim)
        )
    gate.standardize.fit(torch.cat([material.positives, material.negatives]))
    positives, negatives = (
        gate.standardize(material.positives),
        gate.standardize(material.negatives),
    )
    optimizer = torch.optim.AdamW(
        gate.layers.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    half = settings.batch_size // 2
    for step in range(settings.steps):
        chosen = torch.randint(len(positives), (half,), generator=generator)
        other = torch.randint(len(negatives), (settings.batch_size - half,), generator=generator)
        x = torch.cat([positives[chosen], negatives[other]])
        if settings.virtual_negatives:
            x[half:] = _virtual(x[half:], positives, settings.virtual_negatives, generator)
        x = x + settings.noise * torch.randn(x.shape, generator=generator)
        if settings.adversarial:
            own = material.concepts[chosen]
            x[:half] = _adversarial(gate, x[:half], own, settings.adversarial)
        wanted = torch.zeros(len(x), len(config.concepts))
        wanted[torch.arange(half), material.concepts[chosen]] = 1
        # One concept's prompts are negatives of the others: weigh the few positives of each up.
        weight = torch.tensor(float(len(config.concepts)))
        loss = F.binary_cross_entropy_with_logits(gate.layers(x), wanted, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick(step + 1, settings.steps)
    return gate.eval()


def _virtual(
    negatives: Tensor, positives: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """Negatives (batch, dim), of which ``share`` is moved up to ``FARTHEST`` of the way to random positives."""
    chosen = torch.randint(len(positives), (len(negatives),), generator=generator)
    moved = torch.rand(len(negatives), 1, generator=generator) < share
    way = FARTHEST * torch.rand(len(negatives), 1, generator=generator) * moved
    return negatives + way * (positives[chosen] - negatives)


def _adversarial(gate: Gate, positives: Tensor, concepts: Tensor, radius: float) -> Tensor:
    """Positives (batch, dim) moved by ``radius`` to where the gate sees their concept least, by one step down its gradient."""
    x = positives.detach().requires_grad_()
    own = gate.layers(x).gather(1, concepts[:, None])
    (slope,) = torch.autograd.grad(own.sum(), x)
    return positives - radius * F.normalize(slope, dim=1)


@torch.no_grad()
def calibrate(gate: Gate, material: GateMaterial, config: TrainConfig) -> Calibration:
    """Shift and scale each concept's logit so that its threshold is probability 0.5; measure what then goes wrong.

    The threshold lies ``threshold_position`` of the way from the held-back prompts that must stay silent (all but
    ``false_fire_rate`` of them, over all concepts) to the held-back prompts that must fire (all but the faintest twentieth); where the two
    overlap, silence goes first.
    """
    settings = config.gate
    last = gate.layers[-1]
    if not isinstance(last, torch.nn.Linear):
        raise TypeError(f"The gate's last layer must be Linear, got {type(last).__name__}.")
    fire, silent = gate(material.held_positives), gate(material.held_negatives)
    allowed = settings.false_fire_rate / len(config.concepts)
    for concept in range(len(config.concepts)):
        high = torch.quantile(fire[material.held_concepts == concept, concept], 0.05)
        low = torch.quantile(silent[:, concept], 1 - allowed)
        threshold = low + settings.threshold_position * (high - low).clamp(min=0)
        # Sharpness: halfway between the two groups' medians is a logit of 4 away.
        spread = (
            fire[material.held_concepts == concept, concept].median() - silent[:, concept].median()
        ).clamp(min=1)
        last.bias[concept] = (last.bias[concept] - threshold) * 8 / spread
        last.weight[concept] *= 8 / spread
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
