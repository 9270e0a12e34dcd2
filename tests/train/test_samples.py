"""Pictures while training: the plain model's beside those with LoRA, and no trace in the pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from train import state
from train.config import ConfigError, TrainConfig
from train.gate import gather, train_gate
from train.run import train
from train.samples import GAP, LINE, _asked_with, samples_path
from unhype.host.euler import draw_noise, euler
from unhype.host.text import TextBatch
from unhype.lora import LoRAFactors

from .conftest import TinyDenoiser

Make = Callable[..., TrainConfig]
PROMPTS = 'samples.prompts=["a photo of a cat", "a dog", "the corner of a room"]'
SIDE = 32


class TinyPainter(TinyDenoiser):
    """Draws: ten steps of Euler, and latents enlarged are pictures."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        self.room = room

    def noise(self, seeds: Sequence[int], size: int) -> Tensor:
        return draw_noise(seeds, (4, size // 8, size // 8))

    @torch.no_grad()
    def sample(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        *,
        steps: int,
        guidance_scale: float,
        noise: Tensor,
    ) -> Tensor:
        if len(noise) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return x - sigma * self.predict(x, sigma.expand(len(x)), text, factors)

        *_, latents = euler(denoise, 10 * noise, torch.linspace(10, 0.1, steps))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        small = (latents[:, :3] / 40).sigmoid()
        return small.repeat_interleave(8, 2).repeat_interleave(8, 3)


def pictures(path: Path) -> list[list[Tensor]]:
    """Rows of a grid's pictures, (side, side, 3)."""
    grid = Image.open(path).convert("RGB")
    pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(grid.height, grid.width, 3)
    rows = (grid.height - LINE) // (LINE + SIDE + GAP)
    return [
        [pixels[top : top + SIDE, left : left + SIDE] for left in range(0, grid.width, SIDE + GAP)]
        for top in (2 * LINE + row * (LINE + SIDE + GAP) for row in range(rows))
    ]


def test_a_grid_every_so_many_steps_and_after_the_last(make: Make) -> None:
    config = make(PROMPTS, "samples.every=5")
    train(config, denoiser=TinyPainter())
    folder = samples_path(config.output, 1).parent
    assert folder == config.output.with_name("pack.samples")
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000005.png",
        "step-000010.png",
        "step-000012.png",
    ]


def test_a_row_is_a_prompt_without_lora_and_with_it(make: Make) -> None:
    config = make(PROMPTS, "samples.every=6", "samples.steps=10", "samples.seed=7", "train.lr=0.05")
    painter = TinyPainter()
    train(config, denoiser=painter)
    early, late = (pictures(samples_path(config.output, step)) for step in (6, 12))
    assert [len(row) for row in late] == [2, 2, 2]
    text = painter.embed(config.samples.prompts)
    noise = painter.noise([7, 7, 7], SIDE)
    plain = painter.decode(painter.sample(text, None, steps=10, guidance_scale=5.0, noise=noise))
    for before, after, wanted in zip(early, late, plain, strict=True):
        pixels = (wanted * 255).round().to(torch.uint8).permute(1, 2, 0)
        assert torch.equal(before[0], pixels)
        assert torch.equal(after[0], pixels)
        assert not torch.equal(after[1], pixels)
        assert not torch.equal(after[1], before[1])


def test_they_leave_no_trace_in_the_pack(make: Make, tmp_path: Path) -> None:
    plain = make()
    drawn = make(PROMPTS, "samples.every=2", f"output={tmp_path / 'drawn.safetensors'}")
    for config in (plain, drawn):
        train(config, denoiser=TinyPainter())
    first, second = (state.read(config.output)[0] for config in (plain, drawn))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not samples_path(plain.output, 1).parent.exists()


def test_the_weights_drawn_are_those_averaged(make: Make) -> None:
    """An average that hardly moves stays at the weights of the first step."""
    config = make(PROMPTS, "samples.every=1", "train.ema=0.999999", "train.lr=0.05")
    train(config, denoiser=TinyPainter())
    first, last = (pictures(samples_path(config.output, step)) for step in (1, 12))
    for (plain, early), (_, late) in zip(first, last, strict=True):
        assert (late.int() - early.int()).abs().max() <= 1
        assert (late.int() - plain.int()).abs().max() > 1


def test_they_are_drawn_in_smaller_batches_where_memory_runs_out(
    make: Make, tmp_path: Path
) -> None:
    roomy = make(PROMPTS)
    tight = make(PROMPTS, f"output={tmp_path / 'tight.safetensors'}")
    train(roomy, denoiser=TinyPainter())
    train(tight, denoiser=TinyPainter(room=1))
    one, other = (pictures(samples_path(config.output, 12)) for config in (roomy, tight))
    for row, other_row in zip(one, other, strict=True):
        for picture, other_picture in zip(row, other_row, strict=True):
            assert (picture.int() - other_picture.int()).abs().max() <= 1


def test_a_model_that_does_not_draw_is_refused_before_the_work(
    make: Make, denoiser: TinyDenoiser
) -> None:
    stages: list[str] = []
    with pytest.raises(
        ConfigError,
        match=r"samples\.prompts asks for pictures, but tiny .*\(sample, decode, noise\)",
    ):
        train(
            make(PROMPTS),
            denoiser=denoiser,
            progress=lambda event: stages.append(event.stage),
        )
    assert set(stages) == {"loading the model"}


def test_the_network_is_asked_with_the_token_that_the_gate_hears_best(
    make: Make, denoiser: TinyDenoiser
) -> None:
    config = make("gate.tokens=true", "gate.steps=200")
    material = gather(config, denoiser.embed_tokens)
    gate, _ = train_gate(config, material, lambda *_: None)
    texts = [
        "a cat",
        "a cat beside the violin under seven lamps on the wide beach with pink chairs",
    ]
    text = replace(denoiser.embed(texts), heard=denoiser.embed_tokens(texts))
    asked = _asked_with(text, gate)
    assert asked.shape == text.pooled.shape
    assert (gate(asked) >= gate(text.pooled)).all()
    assert not torch.allclose(asked[1], text.pooled[1])
    assert _asked_with(text, None) is text.pooled
