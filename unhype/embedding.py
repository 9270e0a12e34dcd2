"""Prompt embeddings as the networks read them.

A prompt is one vector, that of its end, (dim,), or what the text encoder makes of each of its tokens, (tokens, dim), the end the last.
In a batch, shorter prompts are followed by vectors of zeros, which say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
        """(batch, dim) or (batch, tokens, dim), the same."""
        if embedding.dim() not in (2, 3) or embedding.shape[-1] != len(self.mean):
            raise ValueError(
                f"Expected embeddings of shape (batch, {len(self.mean)}) or (batch, tokens, {len(self.mean)}), "
                f"got {tuple(embedding.shape)}. "
                "They must come from the text encoder that the pack was trained with."
            )
        return (embedding.float() - self.mean) / self.std


def heard(embeddings: Tensor) -> Tensor:
    """Which vectors (..., dim) say anything, (...) of bool."""
    return (embeddings != 0).any(-1)


def until_end(states: Tensor, ends: Tensor) -> Tensor:
    """States (batch, tokens, dim) behind the start token and up to ``ends`` (batch,), zeros behind: (batch, longest, dim)."""
    states = states[:, 1 : int(ends.max()) + 1]
    places = torch.arange(1, states.shape[1] + 1, device=states.device)
    return states * (places <= ends.to(states.device)[:, None])[..., None]


def last_heard(embeddings: Tensor) -> Tensor:
    """The end's vector of every prompt, (batch, dim), of (batch, tokens, dim)."""
    last = heard(embeddings).sum(1).clamp(min=1) - 1
    return embeddings[torch.arange(len(embeddings), device=last.device), last]


def cat_prompts(parts: Sequence[Tensor]) -> Tensor:
    """Batches of prompts one after another: (batch, dim) each, or (batch, tokens, dim) with as many tokens as the longest."""
    if parts[0].dim() == 2:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])
