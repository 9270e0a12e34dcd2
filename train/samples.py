"""Pictures drawn while training: a row for each prompt, the plain model's beside those with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from unhype.gate import Gate
from unhype.host.text import TextBatch
from unhype.hypernetwork import Hypernetwork

from . import state
from .config import ConfigError, TrainConfig
from .denoiser import DenoiserLike
from .evaluate.evaluators import to_bytes
from .gate import surest
from .loop import Step
from .memory import Share

if TYPE_CHECKING:
    from PIL import Image

    from .evaluate.base import PictureModel

DRAWS = ("sample", "decode", "noise")
"""What a model that draws has beside what training needs."""
COLUMNS = ("without LoRA", "with LoRA")
GAP, LINE = 4, 14
"""Pixels between pictures, and of a line of text."""


def samples_path(output: Path, step: int) -> Path:
    """Where the grid of a step is, of the run that writes ``output``."""
    return output.with_suffix(".samples") / f"step-{step:06d}.png"


class Samples:
    """Draws the same pictures every now and then, with the LoRA that the network then writes at s = S, whether or not the gate fires.

    A gate that reads every token says which one the network is asked with, as it will of the pack.

    Raises:
        ConfigError: the model does not draw.
    """

    def __init__(self, config: TrainConfig, denoiser: DenoiserLike) -> None:
        if not _draws(denoiser):
            missing = ", ".join(name for name in DRAWS if not hasattr(denoiser, name))
            raise ConfigError(
                f"samples.prompts asks for pictures, but {denoiser.fingerprint.name} was loaded without what draws them "
                f"({missing}). Leave samples.prompts empty."
            )
        self._config, self._model = config, denoiser
        self._share = Share(
            config.trajectories.batch_size, "sample pictures", "Leave samples.prompts empty"
        )
        self._plain: Tensor | None = None

    def begin(self, done: int) -> None:
        """Nothing: grids of later steps are drawn again."""

    def record(self, step: Step) -> None:
        if not step.is_due(self._config.samples.every):
            return
        prompts = self._config.samples.prompts
        if self._plain is None:
            self._plain = self._draw(None, None)
        grid = _grid(prompts, (self._plain, self._draw(step.hypernetwork, step.gate)))
        path = samples_path(self._config.output, step.number)
        with state.written_whole(path) as part:
            grid.save(part, format="PNG")

    @torch.no_grad()
    def _draw(self, hypernetwork: Hypernetwork | None, gate: Gate | None) -> Tensor:
        """A picture of each prompt, (prompts, 3, height, width) on the CPU."""
        model, settings, states = self._model, self._config.samples, self._config.trajectories
        prompts = settings.prompts
        pictures: list[Tensor] = []

        def draw(size: int) -> Tensor:
            text = model.embed(prompts[len(pictures) : len(pictures) + size])
            latents = model.sample(
                text,
                None if hypernetwork is None else hypernetwork.generate(_asked_with(text, gate)),
                steps=settings.steps,
                guidance_scale=states.guidance_scale,
                noise=model.noise([settings.seed] * len(text), states.size),
            )
            return model.decode(latents).cpu()

        while len(pictures) < len(prompts):
            pictures += self._share.attempt(draw)
        return torch.stack(pictures)


def _draws(denoiser: DenoiserLike) -> TypeGuard[PictureModel]:
    return all(callable(getattr(denoiser, name, None)) for name in DRAWS)


def _asked_with(text: TextBatch, gate: Gate | None) -> Tensor:
    """The vector of each prompt that the hypernetwork reads, (prompts, dim)."""
    if gate is None or not gate.config.tokens:
        return text.pooled
    return surest(gate, text.read.cpu()).to(text.pooled.device)


def _grid(prompts: tuple[str, ...], columns: tuple[Tensor, ...]) -> Image.Image:
    """Columns of pictures under their names, the prompt over each row."""
    from PIL import Image, ImageDraw

    _, _, height, width = columns[0].shape
    row = LINE + height + GAP
    grid = Image.new(
        "RGB", (len(columns) * (width + GAP) - GAP, LINE + len(prompts) * row), "white"
    )
    write = ImageDraw.Draw(grid)
    for column, (name, pictures) in enumerate(zip(COLUMNS, columns, strict=True)):
        left = column * (width + GAP)
        write.text((left, 0), name, fill="black")
        for index, pixels in enumerate(to_bytes(pictures)):
            grid.paste(Image.fromarray(pixels), (left, 2 * LINE + index * row))
    for index, prompt in enumerate(prompts):
        write.text((0, LINE + index * row), prompt, fill="black")
    return grid
