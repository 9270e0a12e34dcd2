"""A frozen denoiser small enough to train against in a second, with everything a real one has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train.config import TrainConfig, make_config
from unhype.checkpoint import BaseFingerprint
from unhype.embedding import cat_prompts
from unhype.families import FAMILIES, FamilySpec
from unhype.host.bypass import adapted, find_sites, find_targets
from unhype.host.denoise import TextBatch
from unhype.lora import LoRAFactors, TargetModule

FAMILY = next(iter(FAMILIES.values()))
GATE: dict[str, object] = {
    "steps": 60,
    "num_positives": 60,
    "num_negatives": 120,
    "scatter_share": 0.0,
    "noise": 1.0,
    "adversarial": 0.0,
    "tokens": False,
    "false_fire_rate": 0.01,
    "threshold_position": 0.5,
}
"""A strict one of prompts' ends, for few prompts."""


class CrossAttention(nn.Module):
    """Keys and values of the text, queries of the picture's positions."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(width, width),
            nn.Linear(context, width),
            nn.Linear(context, width),
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights = (self.to_q(x) @ self.to_k(context).transpose(1, 2) / x.shape[-1] ** 0.5).softmax(
            -1
        )
        return weights @ self.to_v(context)


class Block(nn.Module):
    """A residual cross-attention, named as in the family's models."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn2 = CrossAttention(width, context)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.attn2(x, context)


class TinyModel(nn.Module):
    """Predicts noise for pictures of 4 channels from two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block(16, 24) for _ in range(2))

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        flat = x.flatten(2).transpose(1, 2)
        level = sigma.log().view(-1, 1, 1).expand(-1, flat.shape[1], 1)
        hidden = self.first(torch.cat([flat, level], dim=-1))
        for block in self.blocks:
            hidden = block(hidden, context)
        return self.last(hidden).transpose(1, 2).reshape(x.shape)


def word_vector(word: str, dim: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))


class TinyDenoiser:
    """A text encoder that averages fixed word vectors, and an untrained ``TinyModel``."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = TinyModel().requires_grad_(False)
        self.family: FamilySpec = FAMILY
        self.targets: tuple[TargetModule, ...] = find_targets(self.model, FAMILY.targets)
        self.device = torch.device("cpu")
        self.sites = find_sites(self.model, self.targets)
        self.fingerprint = BaseFingerprint("tiny", "0")

    def embed(self, texts: Sequence[str]) -> TextBatch:
        cross = torch.zeros(len(texts), 12, 24)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.lower().replace(",", "").split()[:12]):
                cross[row, place] = word_vector(word, 24)
        pooled = self.embed_pooled(texts)
        return TextBatch(cross, pooled, pooled)

    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        dim = FAMILY.embedding.dim
        words = [text.lower().replace(",", "").split() or [""] for text in texts]
        return torch.stack([torch.stack([word_vector(w, dim) for w in ws]).mean(0) for ws in words])

    def embed_tokens(self, texts: Sequence[str]) -> Tensor:
        """The average up to each word, of which the last is the pooled one."""
        dim = FAMILY.embedding.dim
        words = [text.lower().replace(",", "").split() or [""] for text in texts]
        return cat_prompts(
            [
                torch.stack([word_vector(w, dim) for w in own]).cumsum(0)[None]
                / torch.arange(1, len(own) + 1).view(1, -1, 1)
                for own in words
            ]
        )

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        if factors is None:
            return self.model(x_t, sigma, text.cross)
        with adapted(self.sites, factors):
            return self.model(x_t, sigma, text.cross)

    @torch.no_grad()
    def rollout(
        self,
        text: TextBatch,
        *,
        steps: int,
        guidance_scale: float,
        seed: int,
        size: int,
        stop_indices: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        sigmas = torch.linspace(10, 0.1, steps)
        x = 10 * torch.randn(
            len(text.cross), 4, size // 8, size // 8, generator=torch.Generator().manual_seed(seed)
        )
        states = []
        for step in range(max(stop_indices) + 1):
            if step in stop_indices:
                states.append(x)
            if step + 1 < steps:
                x = x + (sigmas[step + 1] - sigmas[step]) * self.predict(
                    x, sigmas[step].expand(len(x)), text, None
                )
        return torch.stack(states), sigmas[sorted(stop_indices)]


@pytest.fixture
def denoiser() -> TinyDenoiser:
    return TinyDenoiser()


@pytest.fixture
def data(tmp_path: Path) -> dict[str, object]:
    return small_data(tmp_path)


def small_data(folder: Path) -> dict[str, object]:
    """A small config as plain data."""
    return {
        "checkpoint": "tiny.safetensors",
        "output": str(folder / "pack.safetensors"),
        "concepts": [{"name": "cat", "target": ["cat", "kitty"], "anchor": "an empty meadow"}],
        "retain": [
            "dog",
            "bus",
            "tree",
            "apple",
            "house",
            "ship",
            "guitar",
            "rose",
            "bee",
            "castle",
        ],
        "retain_captions": [
            "a calm morning",
            "rain over the hills",
            "a long road",
            "the corner of a room",
        ],
        "network": {"rank": 4, "hidden_dim": 16},
        "gate": GATE,
        "trajectories": {"rollouts": 6, "states": 2, "steps": 4, "size": 32, "batch_size": 3},
        "train": {"steps": 12, "batch_size": 4, "save_every": 5, "warmup": 2},
    }


@pytest.fixture
def make(data: dict[str, object]) -> Callable[..., TrainConfig]:
    """Configs with values overridden: ``make("train.steps=3")``."""
    return lambda *overrides: make_config(data, overrides)
