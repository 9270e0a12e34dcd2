"""When to act, and how surely: which concepts a prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .embedding import Standardize, heard

SILENT = -1e4
"""Logit of a vector that says nothing."""
EVEN = 0.5
"""Probability at which training puts the threshold."""
SUREST = 0.9999
"""Probability beyond which single precision tells little apart."""


@dataclass(frozen=True)
class GateConfig:
    """Sizes of a gate, and the probability from which a concept fires.

    ``tokens``: whether it reads every token of a prompt, and a concept fires that fires at any; else it reads the end.
    ``least_strength``: of the LoRA of what fires with probability 0.5 or less; it is whole from ``full_strength_at`` on.
    """

    embedding_dim: int
    num_concepts: int
    hidden_dim: int = 64
    threshold: float = 0.5
    tokens: bool = False
    least_strength: float = 1.0
    full_strength_at: float = 0.9

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_concepts", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_threshold(self.threshold)
        if not 0 < self.least_strength <= 1:
            raise ValueError(
                f"least_strength must be more than 0 and at most 1, got {self.least_strength}."
            )
        if not EVEN < self.full_strength_at <= SUREST:
            raise ValueError(
                f"full_strength_at must be more than {EVEN} and at most {SUREST}, got {self.full_strength_at}."
            )


@dataclass(frozen=True)
class Reading:
    """What the gate says of a batch of prompts.

    Attributes:
        probability: of each concept, (batch, concepts).
        fired: which concepts act, (batch, concepts) of bool.
    """

    probability: Tensor
    fired: Tensor

    @property
    def open(self) -> Tensor:
        """Which prompts get a LoRA, (batch,) of bool."""
        return self.fired.any(1)


class Gate(nn.Module):
    """A small classifier of prompt embeddings with one independent output a concept."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.config = config
        self.standardize = Standardize(config.embedding_dim)
        self.layers = nn.Sequential(
            nn.Linear(config.embedding_dim, config.hidden_dim),
            nn.SiLU(),
            nn.Linear(config.hidden_dim, config.num_concepts),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Logits of each concept, (batch, concepts), of (batch, embedding_dim) or at most over (batch, tokens, embedding_dim)."""
        return most(self.layers(self.standardize(embedding)), heard(embedding))

    def read(
        self,
        embedding: Tensor,
        *,
        threshold: float | None = None,
        active: Sequence[bool] | None = None,
    ) -> Reading:
        """Decide which concepts fire.

        Args:
            embedding: (batch, embedding_dim), or (batch, tokens, embedding_dim).
            threshold: probability from which a concept fires; the calibrated one by default.
            active: which concepts may fire; all by default.
        """
        threshold = self.config.threshold if threshold is None else check_threshold(threshold)
        probability = self(embedding).sigmoid()
        fired = probability >= threshold
        if active is not None:
            if len(active) != self.config.num_concepts:
                raise ValueError(
                    f"active must say yes or no for each of {self.config.num_concepts} concepts, got {len(active)}."
                )
            fired = fired & torch.tensor(list(active), device=fired.device)
        return Reading(probability, fired)

    def strength(self, probability: Tensor) -> Tensor:
        """How much of the LoRA to write for what fires with these probabilities, of any shape: the surer, the more.

        Evenly in log-odds from ``least_strength`` at 0.5 to 1 at ``full_strength_at``.
        """
        full = torch.tensor(self.config.full_strength_at).logit()
        way = (probability.logit(eps=1e-6) / full).clamp(0, 1)
        return 1 - (1 - self.config.least_strength) * (1 - way)


def most(logits: Tensor, heard: Tensor) -> Tensor:
    """The highest logits (batch, concepts) at any vector that is heard, of (batch, tokens, concepts) and (batch, tokens)."""
    if logits.dim() == 2:
        return logits
    return logits.masked_fill(~heard[..., None], SILENT).amax(1)


def check_threshold(threshold: float) -> float:
    """The threshold, if it is a probability; ``ValueError`` if not."""
    if not 0 < threshold < 1:
        raise ValueError(f"The gate's threshold is a probability between 0 and 1, got {threshold}.")
    return float(threshold)
