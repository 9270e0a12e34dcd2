"""Every way to erase as one function, from prompt embeddings to LoRA factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unhype.checkpoint import Pack
from unhype.embedding import last_heard
from unhype.lora import LoRAFactors, combine


@dataclass(frozen=True)
class Written:
    """What an eraser does to a batch of prompts.

    Attributes:
        factors: one row a prompt, or none if nothing happens to any.
        acts: which prompts are touched at all, (n,) of bool; the pictures of others are the model's own.
    """

    factors: LoRAFactors | None
    acts: Tensor


class Eraser(Protocol):
    """A method at work."""

    def write(self, embedding: Tensor) -> Written:
        """What happens to prompts with these embeddings, (n, embedding_dim) or of all tokens, (n, tokens, embedding_dim)."""
        ...


def at_ends(embedding: Tensor) -> Tensor:
    """Only the vectors of the prompts' ends, (n, embedding_dim)."""
    return last_heard(embedding) if embedding.dim() == 3 else embedding


@dataclass(frozen=True)
class NoEraser:
    """The model as it is."""

    def write(self, embedding: Tensor) -> Written:
        return Written(None, torch.zeros(len(embedding), dtype=torch.bool))


@dataclass(frozen=True)
class PackEraser:
    """A pack, as the nodes use it."""

    pack: Pack

    def write(self, embedding: Tensor) -> Written:
        generated = self.pack.generate(embedding)
        return Written(generated.factors, generated.reading.open.cpu())


@dataclass(frozen=True)
class StaticEraser:
    """One LoRA for every prompt; any edit of the weights is one, of high enough rank.

    Attributes:
        factors: a single row.
    """

    factors: LoRAFactors

    def write(self, embedding: Tensor) -> Written:
        rows = self.factors.rows([0] * len(embedding))
        return Written(rows, torch.ones(len(embedding), dtype=torch.bool))


@dataclass(frozen=True)
class SimilarityEraser:
    """A static LoRA a concept, each as strong as its concept's word is similar to the prompt (SPM, arXiv:2312.16145).

    Strength is the cosine similarity of the prompt to the nearest phrase of the concept, both less the mean of ordinary
    prompts, and 0 below ``floor``.

    Attributes:
        loras: a row a concept.
        phrases: embeddings of all phrases, (phrases, dim).
        owners: the concept of each phrase, (phrases,).
        center: mean embedding of ordinary prompts, (dim,).
    """

    loras: LoRAFactors
    phrases: Tensor
    owners: Tensor
    center: Tensor
    floor: float = 0.3

    def write(self, embedding: Tensor) -> Written:
        strength = self.strength(at_ends(embedding))
        rows = []
        for row in strength:
            acting = row.nonzero().flatten().tolist()
            rows.append([self.loras.rows([c]).scaled(row[c]) for c in acting])
        return Written(combine(rows, self.loras.targets), (strength > 0).any(1).cpu())

    def strength(self, pooled: Tensor) -> Tensor:
        """Of each concept's LoRA, (n, concepts)."""
        similarity = (
            F.normalize(pooled - self.center, dim=-1)
            @ F.normalize(self.phrases - self.center, dim=-1).T
        )
        nearest = torch.stack(
            [similarity[:, self.owners == concept].amax(1) for concept in range(len(self.loras))],
            dim=1,
        )
        return nearest.clamp(min=0) * (nearest >= self.floor)
