"""States z_t on the frozen model's own trajectories, with its predictions there, computed once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from unhype.host.denoise import TextBatch

from .config import TrajectoryConfig
from .denoiser import DenoiserLike
from .memory import Share

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Pool:
    """States and the frozen model's predictions for a prompt p and for its anchor prompt m.

    Attributes:
        cross, pooled, host_pooled: encodings of the prompts p, (num_prompts, ...)
        prompt: which prompt a state belongs to, (num_states,)
        latents, prediction, anchor_prediction: (num_states, channels, height, width)
        sigmas: (num_states,)
    """

    cross: Tensor
    pooled: Tensor
    host_pooled: Tensor
    prompt: Tensor
    latents: Tensor
    sigmas: Tensor
    prediction: Tensor
    anchor_prediction: Tensor

    @property
    def text(self) -> TextBatch:
        """The prompts p."""
        return TextBatch(self.cross, self.pooled, self.host_pooled)

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Batch:
    """Some states of a pool; ``text`` is the prompts p, row by row, and ``prompt`` their numbers in the pool."""

    text: TextBatch
    prompt: Tensor
    latents: Tensor
    sigmas: Tensor
    prediction: Tensor
    anchor_prediction: Tensor

    def part(self, rows: slice) -> Batch:
        """Some of them, without a copy."""
        text = TextBatch(self.text.cross[rows], self.text.pooled[rows], self.text.host_pooled[rows])
        return Batch(
            text,
            self.prompt[rows],
            self.latents[rows],
            self.sigmas[rows],
            self.prediction[rows],
            self.anchor_prediction[rows],
        )


def draw(pool: Pool, batch_size: int, generator: torch.Generator) -> Batch:
    """States drawn with replacement."""
    index = torch.randint(len(pool.prompt), (batch_size,), generator=generator)
    prompt = pool.prompt[index]
    return Batch(
        pool.text.rows(prompt),
        prompt,
        pool.latents[index],
        pool.sigmas[index],
        pool.prediction[index],
        pool.anchor_prediction[index],
    )


def collect(
    denoiser: DenoiserLike,
    prompts: Sequence[tuple[str, str]],
    config: TrajectoryConfig,
    *,
    seed: int,
    tick: Tick,
) -> Pool:
    """Roll the frozen model out on prompts p, a share of them on their anchors m, and predict for both.

    Where memory runs out, the rest is rolled out in smaller batches.

    Args:
        prompts: pairs (p, m); equal ones give states whose prediction is to be kept.
    """
    rng = random.Random(f"unhype trajectories {seed}")
    texts = embed_in_batches(denoiser, [p for p, _ in prompts], config.batch_size)
    same = all(p == m for p, m in prompts)
    anchors = (
        texts if same else embed_in_batches(denoiser, [m for _, m in prompts], config.batch_size)
    )

    def roll_out(start: int, drawn: tuple[object, ...], size: int) -> list[tuple[Tensor, ...]]:
        """For each kept step of some prompts: their index, states, noise levels and both predictions."""
        rng.setstate(drawn)
        index = torch.arange(start, min(start + size, len(prompts)))
        text, anchor = texts.rows(index), anchors.rows(index)
        followed = [
            row + len(index) * (rng.random() < config.anchor_share) for row in range(len(index))
        ]
        states, sigmas = denoiser.rollout(
            TextBatch.cat([text, anchor]).rows(followed),
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            seed=rng.getrandbits(31),
            size=config.size,
            stop_indices=_stops(config, rng),
        )
        parts = []
        for latents, sigma in zip(states, sigmas, strict=True):
            sigma = sigma.expand(len(index))
            with torch.no_grad():
                prediction = denoiser.predict(latents, sigma, text, None).float()
                twin = (
                    prediction if same else denoiser.predict(latents, sigma, anchor, None).float()
                )
            parts.append((index, latents, sigma, prediction, twin))
        return parts

    share = Share(config.batch_size, "pictures of a rollout", "Lower trajectories.size")
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    while done < len(prompts):
        parts += share.attempt(partial(roll_out, done, rng.getstate()))
        done = min(done + share.at_once, len(prompts))
        tick(done, len(prompts))
    # Contiguous, as they come back from disk: sums over another memory order differ in the last bit.
    prompt, latents, sigmas, prediction, twin = (
        torch.cat(part).contiguous() for part in zip(*parts, strict=True)
    )
    encoded = (texts.cross, texts.pooled, texts.host_pooled)
    return Pool(*encoded, prompt, latents, sigmas, prediction, twin)


def embed_in_batches(
    denoiser: DenoiserLike, texts: Sequence[str], batch_size: int, tick: Tick | None = None
) -> TextBatch:
    """Encode texts, each distinct one once."""
    distinct = list(dict.fromkeys(texts))
    batches = []
    for start in range(0, len(distinct), batch_size):
        batches.append(denoiser.embed(distinct[start : start + batch_size]))
        if tick is not None:
            tick(min(start + batch_size, len(distinct)), len(distinct))
    place = {text: index for index, text in enumerate(distinct)}
    return TextBatch.cat(batches).rows([place[text] for text in texts])


def _stops(config: TrajectoryConfig, rng: random.Random) -> list[int]:
    """One step drawn from each of ``states`` equal stretches of the rollout."""
    stretch = config.steps / config.states
    return sorted({int((part + rng.random()) * stretch) for part in range(config.states)})
