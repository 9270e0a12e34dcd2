"""What ties a LoRA to a conditioning on its way to the sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checkpoint import Generated
from ..families import Branch
from ..lora import LoRAFactors

KEY = "unhype"
"""Of the payload in a conditioning entry, of the wrappers, and of the run in ``transformer_options``."""
NEGATIVE_ROLES = frozenset({"negative", "empty_negative_prompt"})
"""What the host's guiders call conditionings that steer away."""


@dataclass(frozen=True, eq=False)
class Payload:
    """A LoRA in a conditioning entry.

    Attributes:
        owner: the pack's name, for messages.
        factors: one row for each embedding of the entry, or for each 77 tokens of its text; strength included.
        start_percent, end_percent: the part of sampling in which it acts.
        per_chunk: whether the rows are for 77 tokens each.
    """

    owner: str
    branch: Branch
    factors: LoRAFactors
    start_percent: float
    end_percent: float
    per_chunk: bool = False

    @classmethod
    def of(
        cls,
        owner: str,
        branch: Branch,
        generated: Generated,
        strength: float,
        start_percent: float,
        end_percent: float,
    ) -> Payload:
        """What was generated for a conditioning entry, ready to travel with it."""
        chunks = generated.chunks
        factors = generated.factors if chunks is None else chunks
        return cls(
            owner,
            branch,
            factors.scaled(strength),
            start_percent,
            end_percent,
            per_chunk=chunks is not None,
        )

    def same_as(self, other: Payload) -> bool:
        """Whether both do the same."""
        mine, others = self.factors, other.factors
        return (
            (self.start_percent, self.end_percent) == (other.start_percent, other.end_percent)
            and self.per_chunk == other.per_chunk
            and mine.targets == others.targets
            and all(
                torch.equal(a, b)
                for a, b in zip(
                    (*mine.down, *mine.up, mine.scale),
                    (*others.down, *others.up, others.scale),
                    strict=True,
                )
            )
        )
