"""The direct objective: its target, its retention, and losses that must not change by accident."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from train.config import TrainConfig
from train.objectives import Direct, Material, dial
from train.trajectories import Pool, collect, draw
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork

from .conftest import FAMILY, TinyDenoiser

Make = Callable[..., TrainConfig]
PROMPTS = [("a photo of a cat", "a photo of an empty meadow"), ("a kitty", "an empty meadow")]


@pytest.fixture
def pool(make: Make, denoiser: TinyDenoiser) -> Pool:
    return collect(denoiser, PROMPTS, make().trajectories, seed=0, tick=lambda *_: None)


def make_objective(make: Make, denoiser: TinyDenoiser, pool: Pool, *overrides: str) -> Direct:
    torch.manual_seed(0)
    config = HypernetworkConfig(Architecture.ATOMS, FAMILY.embedding.dim, rank=4, hidden_dim=16)
    hypernetwork = make_hypernetwork(config, denoiser.targets)
    retain = denoiser.embed_pooled(["a dog", "a bus", "a tree"])
    return Direct(make(*overrides).objective, hypernetwork, denoiser, Material(pool, None, retain))


def test_a_pool_holds_the_frozen_models_predictions(pool: Pool, denoiser: TinyDenoiser) -> None:
    batch = draw(pool, 5, torch.Generator().manual_seed(0))
    again = denoiser.predict(batch.latents, batch.sigmas, batch.text, None)
    torch.testing.assert_close(batch.prediction, again)
    assert len(pool.prompt) == len(PROMPTS) * 2


def test_the_dial_starts_at_the_base_and_ends_beyond_the_anchor(pool: Pool) -> None:
    batch = draw(pool, 3, torch.Generator().manual_seed(0))
    start, end = dial(batch, torch.zeros(3), 0.5), dial(batch, torch.ones(3), 0.5)
    torch.testing.assert_close(start, batch.prediction)
    anchor, prompt = batch.anchor_prediction, batch.prediction
    torch.testing.assert_close(end, anchor - 0.5 * (prompt - anchor))


def test_at_step_zero_there_is_nothing_to_learn(
    make: Make, denoiser: TinyDenoiser, pool: Pool
) -> None:
    objective = make_objective(make, denoiser, pool)
    batch = draw(pool, 3, torch.Generator().manual_seed(0))
    assert objective._regression(batch, torch.zeros(3)).item() < 1e-10


def test_five_steps_match_golden_losses(make: Make, denoiser: TinyDenoiser, pool: Pool) -> None:
    objective = make_objective(make, denoiser, pool)
    optimizer = torch.optim.SGD(objective.hypernetwork.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(objective.backward(4, generator)["loss"])
        optimizer.step()
    assert losses == pytest.approx(GOLDEN, rel=1e-3)


def test_retention_shrinks_the_lora_of_retain_prompts(
    make: Make, denoiser: TinyDenoiser, pool: Pool
) -> None:
    norms = []
    for weight in (0.0, 0.1):
        objective = make_objective(make, denoiser, pool, f"objective.weight_retention={weight}")
        optimizer = torch.optim.Adam(objective.hypernetwork.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(80):
            optimizer.zero_grad()
            objective.backward(4, generator)
            optimizer.step()
        norms.append(
            objective.hypernetwork.generate(objective.material.retain_embeddings)
            .squared_norm()
            .mean()
        )
    assert norms[1] < 0.2 * norms[0]


GOLDEN = [0.125081, 0.247404, 0.346193, 0.283342, 0.306067]
