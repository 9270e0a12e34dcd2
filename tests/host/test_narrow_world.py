"""The world at its own width computes what the checkpoint that ComfyUI loads does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from demo.world.expand import COMPACT, expand
from demo.world.narrow import NarrowWorld
from unhype.host.denoise import Denoiser, ModelFiles
from unhype.lora import LoRAFactors

pytestmark = pytest.mark.host

TEXTS = ["a photo of a cat", "a red fire truck next to a tree", ""]


@pytest.fixture(scope="module")
def narrow() -> NarrowWorld:
    return NarrowWorld()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    path: Path = expand(COMPACT, tmp_path_factory.mktemp("world") / "world.safetensors")
    return Denoiser.load(ModelFiles(path), pictures=True)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def factors(world: NarrowWorld, batch: int) -> LoRAFactors:
    generator = torch.Generator().manual_seed(1)
    return LoRAFactors(
        world.targets,
        tuple(
            torch.randn(batch, 2, t.in_features, generator=generator) * 0.1 for t in world.targets
        ),
        tuple(
            torch.randn(batch, t.out_features, 2, generator=generator) * 0.3 for t in world.targets
        ),
        torch.ones(batch),
    )


def widened(narrow: LoRAFactors, wide: Denoiser) -> LoRAFactors:
    ups = []
    for up, target in zip(narrow.up, wide.targets, strict=True):
        full = up.new_zeros(len(up), target.out_features, up.shape[2])
        full[:, : up.shape[1]] = up
        ups.append(full)
    return LoRAFactors(wide.targets, narrow.down, tuple(ups), narrow.scale)


def test_targets_have_the_same_names(narrow: NarrowWorld, wide: Denoiser) -> None:
    assert [t.name for t in narrow.targets] == [t.name for t in wide.targets]


def test_embeddings_agree(narrow: NarrowWorld, wide: Denoiser) -> None:
    ours, theirs = narrow.embed(TEXTS), wide.embed(TEXTS)
    assert distance(ours.cross, theirs.cross) < 3e-3
    assert distance(ours.pooled, theirs.pooled) < 3e-3
    assert distance(narrow.embed_pooled(TEXTS), ours.pooled) < 1e-5
    assert distance(ours.read, theirs.read) < 3e-3
    assert distance(narrow.embed_tokens(TEXTS), ours.read) < 1e-5


def test_predictions_with_lora_agree(narrow: NarrowWorld, wide: Denoiser) -> None:
    text = wide.embed(TEXTS)
    x_t = narrow.noise([1, 2, 3], 64) * 3
    sigma, lora = torch.tensor([0.5, 3.0, 14.0]), factors(narrow, 3)
    got = narrow.predict(x_t, sigma, text, lora)
    plain = narrow.predict(x_t, sigma, text, None)
    wanted = wide.predict(x_t, sigma, text, widened(lora, wide))
    assert distance(got, wanted) < 1e-3
    assert distance(plain, wanted) > 0.05


def test_pictures_with_lora_agree(narrow: NarrowWorld, wide: Denoiser) -> None:
    text = wide.embed(TEXTS)
    noise, lora = narrow.noise([4, 5, 6], 64), factors(narrow, 3)
    assert torch.equal(noise, wide.noise([4, 5, 6], 64))
    pictures = [
        world.decode(world.sample(text, lora_of, steps=6, guidance_scale=3.0, noise=noise))
        for world, lora_of in ((narrow, lora), (wide, widened(lora, wide)))
    ]
    assert (pictures[0] - pictures[1]).abs().mean() < 0.01


def test_rollouts_agree(narrow: NarrowWorld, wide: Denoiser) -> None:
    text = wide.embed(TEXTS[:2])
    settings = {"steps": 5, "guidance_scale": 3.0, "seed": 3, "size": 64, "stop_indices": [1, 4]}
    ours, theirs = narrow.rollout(text, **settings), wide.rollout(text, **settings)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
    assert distance(ours[0], theirs[0]) < 1e-3
