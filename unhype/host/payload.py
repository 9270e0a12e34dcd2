"""What ties a LoRA to a conditioning on its way to the sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        whole: what does instead where ``factors`` can't be laid out by 77 tokens; only if they are meant so.
    """

    owner: str
    branch: Branch
    factors: LoRAFactors
    start_percent: float
    end_percent: float
    whole: LoRAFactors | None = None

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
        whole = generated.factors.scaled(strength)
        if generated.chunks is None:
            return cls(owner, branch, whole, start_percent, end_percent)
        chunks = generated.chunks.scaled(strength)
        return cls(owner, branch, chunks, start_percent, end_percent, whole)

    @property
    def per_chunk(self) -> bool:
        """Whether the rows are for 77 tokens each."""
        return self.whole is not None

    def as_whole(self) -> Payload:
        """The same with rows for the entry's embeddings."""
        return self if self.whole is None else replace(self, factors=self.whole, whole=None)

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
