"""A pack as a technique of the public benchmark eval-unlearn (PyPI, MIT), which finds it by its entry point.

The benchmark makes one of the ``technique.config`` of its own settings file, and asks it for pictures of prompts.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image

from unhype import checkpoint
from unhype.checkpoint import from_plain
from unhype.host.denoise import Denoiser, ModelFiles

from ..denoiser import check_family
from .base import PictureModel
from .erasers import Eraser, NoEraser, PackEraser
from .evaluators import to_bytes

log = logging.getLogger("unhype")


@dataclass(frozen=True)
class TechniqueConfig:
    """What ``technique.config`` may say.

    Attributes:
        checkpoint: the model file that ComfyUI loads.
        text_encoders, vae: files of their own, if the checkpoint does not hold them.
        pack: a pack for it; without one the plain model draws, to compare with.
        erase_concept: what the benchmark's report calls the concept; some of its metrics ask for it.
        concepts: the pack's concepts that may fire; all by default.
        size: of the pictures in pixels.
        batch_size: pictures at once.
        comfyui: where ComfyUI is, if it is not to be looked for.
    """

    checkpoint: str
    pack: str = ""
    erase_concept: str = ""
    concepts: tuple[str, ...] = ()
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    size: int = 512
    batch_size: int = 1
    comfyui: str | None = None
    text_encoders: tuple[str, ...] = ()
    vae: str = ""


class UnHypeTechnique:
    """Draws the benchmark's prompts with a pack at work, as the nodes do."""

    def __init__(self, **config: object) -> None:
        """Load model and pack.

        Raises:
            ValueError: the config is wrong, or the pack is not for this model.
            FileNotFoundError: checkpoint, pack or ComfyUI is missing.
        """
        self.config = read_config(config)
        comfyui = Path(self.config.comfyui) if self.config.comfyui else None
        vae = Path(self.config.vae) if self.config.vae else None
        files = ModelFiles(
            Path(self.config.checkpoint), tuple(map(Path, self.config.text_encoders)), vae
        )
        self._model: PictureModel = Denoiser.load(files, comfyui, pictures=True)
        self._eraser: Eraser = self._load_pack() if self.config.pack else NoEraser()

    def _load_pack(self) -> PackEraser:
        pack = checkpoint.load(Path(self.config.pack), self._model.device)
        check_family(pack, self._model)
        return PackEraser(pack.only(self.config.concepts) if self.config.concepts else pack)

    def generate(
        self,
        prompts: Sequence[str],
        seed: int | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Image.Image]:
        """One picture of each prompt.

        Args:
            seed: of the first picture, the next one's is one more; of torch's own state by default.
            num_inference_steps, guidance_scale: in place of the config's.
        """
        config, model = self.config, self._model
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        texts = [literal(prompt, self._fits) for prompt in prompts]
        images = []
        for start in range(0, len(texts), config.batch_size):
            text = model.embed(texts[start : start + config.batch_size])
            written = self._eraser.write(text.read)
            first = seed + start
            latents = model.sample(
                text,
                written.factors if written.acts.any() else None,
                steps=num_inference_steps or config.num_inference_steps,
                guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
                noise=model.noise(range(first, first + len(text)), config.size),
            )
            images += [Image.fromarray(picture) for picture in to_bytes(model.decode(latents))]
        return images

    def _fits(self, text: str) -> bool:
        """Whether the model reads a text at once."""
        try:
            self._model.embed_pooled([text])
        except ValueError:
            return False
        return True


def read_config(config: dict[str, object]) -> TechniqueConfig:
    """The config as the benchmark's settings file gives it; ``ValueError`` if it is wrong."""
    try:
        read: TechniqueConfig = from_plain(TechniqueConfig, config)
    except ValueError as error:
        known = ", ".join(field.name for field in fields(TechniqueConfig))
        raise ValueError(
            f"technique.config is wrong: {error} It may hold {known}; checkpoint is needed."
        ) from error
    if read.concepts and not read.pack:
        raise ValueError(
            f"concepts names {read.concepts[0]!r} of a pack, but there is no pack; give one."
        )
    if read.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {read.batch_size}.")
    return read


def literal(prompt: str, fits: Callable[[str], bool]) -> str:
    """A prompt as the benchmark's other techniques read it: brackets are no weights, and an end that is too long is dropped.

    Args:
        fits: whether the model reads a text at once.
    """
    text = prompt.replace("(", r"\(").replace(")", r"\)")
    if fits(text):
        return text
    words = text.split()
    kept = bisect.bisect_left(
        range(len(words)), True, key=lambda index: not fits(" ".join(words[: index + 1]))
    )
    log.info(
        "A prompt of %d words is longer than the model reads; used its first %d.", len(words), kept
    )
    return " ".join(words[:kept])
