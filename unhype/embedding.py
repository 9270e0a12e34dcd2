"""Prompt embeddings as the networks read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """Shift and scale every dimension of an embedding by statistics that ``fit`` takes from many prompts.

    Pooled text states share a large common offset; without this, all prompts look alike.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, embeddings: Tensor) -> None:
        """Take mean and standard deviation of (prompts, dim)."""
        if embeddings.dim() != 2 or len(embeddings) < 2:
            raise ValueError(
                f"Standardizing needs embeddings of at least two prompts, (prompts, dim), got {tuple(embeddings.shape)}."
            )
        self.mean.copy_(embeddings.mean(0))
        # A floor keeps a dimension that never moves from exploding on a prompt where it does.
        std = embeddings.std(0)
        self.std.copy_(std.clamp(min=0.1 * float(std.mean()) + 1e-6))

    def forward(self, embedding: Tensor) -> Tensor:
        """(batch, dim) -> (batch, dim)."""
        if embedding.dim() != 2 or embedding.shape[1] != len(self.mean):
            raise ValueError(
                f"Expected embeddings of shape (batch, {len(self.mean)}), got {tuple(embedding.shape)}. "
                "They must come from the text encoder that the pack was trained with."
            )
        return (embedding.float() - self.mean) / self.std
