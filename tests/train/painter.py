"""A model, an evaluator and a world small enough to evaluate and compare in seconds, with everything real ones have."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.config import make_config
from train.evaluate.base import Judgement, Kind, Question, Sampling, Task
from unhype.host.denoise import TextBatch
from unhype.host.euler import draw_noise, euler
from unhype.lora import LoRAFactors

# By path, for processes that another one launches have no package around this file.
spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

SAMPLING = Sampling(steps=2, guidance_scale=1.0, size=16, batch_size=4)


class Painter(tiny.TinyDenoiser):
    """The tiny denoiser, whose latents' first three channels are its pictures."""

    def sample(
        self,
        text: TextBatch,
        factors: LoRAFactors | None,
        *,
        steps: int,
        guidance_scale: float,
        noise: Tensor,
    ) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return x - sigma * self.predict(x, sigma.expand(len(x)), text, factors)

        with torch.no_grad():
            *_, latents = euler(denoise, 10 * noise, torch.linspace(10, 0.1, steps + 1))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].sigmoid()

    def noise(self, seeds: Sequence[int], size: int) -> Tensor:
        return draw_noise(seeds, (4, size, size))


@dataclass(frozen=True)
class Eye:
    """Takes the brighter half of a picture for what is in it."""

    labels: tuple[str, ...] = ("cat", "bus")
    present: float = 0.5

    def judge(self, pictures: Tensor) -> Judgement:
        halves = torch.stack([half.mean((1, 2, 3)) for half in pictures.chunk(2, dim=3)], dim=1)
        return Judgement(halves, pictures.flatten(1))


@dataclass(frozen=True)
class Studio:
    """The world around them.

    Attributes:
        folder: for what its configs name.
    """

    folder: Path
    name: str = "studio"
    sampling: Sampling = SAMPLING
    most: int = 1

    def model(self) -> Painter:
        return Painter()

    def evaluator(self) -> Eye:
        return Eye()

    def task(self, num_concepts: int, seed: int) -> Task:
        config = make_config(tiny.small_data(self.folder), [f"seed={seed}"])
        questions = (
            Question(Kind.TARGET, "my cat", ("cat",), "cat"),
            Question(Kind.UNRELATED, "my bus", ("bus",), "bus"),
        )
        return Task(config, questions)
