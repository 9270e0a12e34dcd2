"""The evaluator: a small multi-label classifier of concepts and styles, trained on the real art only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .concepts import STYLES, load_concepts

PRESENT = 0.5
"""A concept counts as present in a scene from this probability on."""
NOTHING = 0.05
"""Below this probability of every concept a picture shows none; an empty meadow has up to 0.03."""


class Evaluator(nn.Module):
    """Concept and style logits of 64-pixel pictures."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.num_concepts = len(load_concepts())

        def stage(before: int, after: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(before, after, 3, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]

        self.features = nn.Sequential(
            *stage(3, width, 2),
            *stage(width, 2 * width, 2),
            *stage(2 * width, 2 * width, 1),
            *stage(2 * width, 4 * width, 2),
            *stage(4 * width, 4 * width, 1),
            *stage(4 * width, 6 * width, 1),
        )
        self.head = nn.Conv2d(6 * width, self.num_concepts + len(STYLES), 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 3, 64, 64) in [0, 1] -> concept logits (batch, concepts), style logits (batch, styles).

        Every place of the picture has its say about every concept, and the surest places decide: small objects count.
        """
        places = self.head(self.features(pictures - 0.5)).flatten(2).float()
        concepts, styles = places.split([self.num_concepts, len(STYLES)], dim=1)
        return concepts.logsumexp(-1) - math.log(places.shape[-1]), styles.mean(-1)


@dataclass(frozen=True)
class Judgement:
    """What the evaluator sees in a batch of pictures."""

    top: Tensor
    """Most likely concept, (batch,), -1 if there is none."""
    presence: Tensor
    """Probability that each concept is in the picture, (batch, concepts)."""
    style: Tensor
    """Most likely style, (batch,)."""


@torch.no_grad()
def judge(evaluator: Evaluator, pictures: Tensor, *, batch: int = 256) -> Judgement:
    """Score pictures (n, 3, 64, 64) in [0, 1]."""
    concepts, styles = (
        torch.cat(parts)
        for parts in zip(*(evaluator(p) for p in pictures.split(batch)), strict=True)
    )
    presence = concepts.sigmoid()
    top = presence.argmax(-1).masked_fill(presence.amax(-1) < NOTHING, -1)
    return Judgement(top, presence, styles.argmax(-1))


def load_evaluator(path: Path) -> Evaluator:
    """The committed evaluator, ready to judge."""
    evaluator = Evaluator()
    state = {name: value.float() for name, value in load_file(path).items()}
    evaluator.load_state_dict(state, strict=False)
    missing = [
        name for name in evaluator.state_dict() if name not in state and "num_batches" not in name
    ]
    if missing:
        raise ValueError(
            f"{path} is not this world's evaluator: {missing[0]} is missing. Run `make world` to rebuild it."
        )
    return evaluator.eval()


def evaluator_loss(logits: tuple[Tensor, Tensor], present: Tensor, style: Tensor) -> Tensor:
    """Multi-label loss of concepts, softmax loss where there is just one, softmax loss of the style.

    Args:
        present: 0/1 labels, (batch, concepts).
        style: style numbers, (batch,); -1 where the picture has no object.
    """
    concepts, styles = logits
    loss = F.binary_cross_entropy_with_logits(concepts, present) * 100
    single = present.sum(-1) == 1
    loss = loss + F.cross_entropy(concepts[single], present[single].argmax(-1))
    return loss + 0.3 * F.cross_entropy(styles, style, ignore_index=-1)


def train_evaluator(
    sample: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    *,
    steps: int,
    batch: int,
    lr: float = 3e-3,
    report: Callable[[int, float], None],
) -> Evaluator:
    """Train on ``sample(batch)`` -> pictures, presence labels, styles; kornia roughens the pictures."""
    evaluator = Evaluator().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    augment = K.AugmentationSequential(
        K.RandomAffine(
            degrees=6, translate=(0.03, 0.03), scale=(0.93, 1.07), p=0.5, padding_mode="border"
        ),
        K.RandomGaussianBlur((3, 3), (0.4, 1.2), p=0.4),
        K.ColorJiggle(0.12, 0.12, 0.15, 0.02, p=0.5),
        K.RandomGaussianNoise(std=0.03, p=0.4),
    )
    optimizer = torch.optim.AdamW(evaluator.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        pictures, present, style = sample(batch)
        with torch.no_grad():
            pictures = augment(pictures).clamp(0, 1).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            concepts, styles = evaluator(pictures)
        loss = evaluator_loss((concepts.float(), styles.float()), present, style)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    return evaluator.eval()
