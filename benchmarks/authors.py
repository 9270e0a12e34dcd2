"""The training loop of the method's authors as their code has it: every step follows a guided rollout of its own to one state.

Of arXiv:2602.03410. What differs only helps it: prompts are encoded once, both plain predictions are one call, and the gradient of
the task goes through the frozen model once for both losses.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from demo.world.unet import noise_schedule
from train.config import ObjectiveConfig, ObjectiveName, TrainConfig
from train.evaluate.base import PictureModel
from train.evaluate.methods import JOINT_HIDDEN, JOINT_RANK, UngatedEraser
from train.objectives import Material, Trajectory
from train.prompts import fill, split_templates, target_phrases
from train.trajectories import Pool, embed_in_batches
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork

SAMPLER_STEPS, GUIDANCE = 50, 7.5
FIRST_TIME, TIMES = 100, 1000
"""Times of the state i begin at i / 50 of the first: less noise than it mostly holds. ESD, where this comes from, has 1000 for both."""
NEGATIVE_GUIDANCE, ETA, REMOVE_WEIGHT, RETAIN_WEIGHT, RETAINED = 2.0, 1e-4, 10.0, 1.0, 64
NUM_FREQUENCIES = 16
MILESTONE, DECAY = 300, 0.9
RETAIN_TEMPLATE = "a photo of the {}"
ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Recipe:
    """Learning rates of the two optimizers, as the authors publish them."""

    lr_remove: float
    lr_retain: float


RECIPES = {"objects": Recipe(1e-3, 1e-3), "celebrities": Recipe(1e-4, 3e-4)}
"""By what their configs erase; that for nudity has the rates of objects."""


def steps_before(i: int) -> int:
    """Steps of the sampler that lead to the state they call i, from 0 to 49; of 50 the last is never taken."""
    return min(SAMPLER_STEPS - i, SAMPLER_STEPS - 1)


def time_range(i: int) -> tuple[int, int]:
    """The times, both included, of which one is drawn for the state i."""
    return (
        round(FIRST_TIME * i / SAMPLER_STEPS),
        round(TIMES * (i + 1) / SAMPLER_STEPS) - 1,
    )


class AuthorsLoop:
    """Objective ``joint`` on ``heads`` without a gate, one state a step, two Adam one after the other, no clipping.

    Attributes:
        seconds: of processor time that training took until now, reading prompts included.
        steps: taken until now.
    """

    def __init__(self, config: TrainConfig, model: PictureModel, recipe: Recipe) -> None:
        began = time.process_time()
        self._config, self._model = config, model
        self._rng = random.Random(f"unhype authors {config.seed}")
        self._generator = torch.Generator().manual_seed(config.seed)
        self._encode_prompts()
        sizes = HypernetworkConfig(
            Architecture.HEADS,
            model.family.embedding.dim,
            rank=JOINT_RANK,
            hidden_dim=JOINT_HIDDEN,
            num_frequencies=NUM_FREQUENCIES,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._hypernetwork = make_hypernetwork(sizes, model.targets).to(model.device)
        self._settings = ObjectiveConfig(
            name=ObjectiveName.JOINT,
            negative_guidance=NEGATIVE_GUIDANCE,
            remove_weight=REMOVE_WEIGHT,
            eta=ETA,
            retain_weight=RETAIN_WEIGHT,
            retain_batch_size=RETAINED,
        )
        self._optimizers = [
            torch.optim.Adam(self._hypernetwork.parameters(), lr=lr)
            for lr in (recipe.lr_remove, recipe.lr_retain)
        ]
        self._schedules = [
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [MILESTONE], DECAY)
            for optimizer in self._optimizers
        ]
        self.steps = 0
        self.seconds = time.process_time() - began

    def run(self, until: float) -> None:
        """Train until it has taken so many seconds in all."""
        while self.seconds < until:
            began = time.process_time()
            self._step()
            self.seconds += time.process_time() - began

    @property
    def eraser(self) -> UngatedEraser:
        """What it has learned, as the authors use it."""
        return UngatedEraser(self._hypernetwork)

    def _step(self) -> None:
        material = Material(self._roll_out(), None, self._retained)
        objective = Trajectory(self._settings, self._hypernetwork, self._model, material, ETA)
        turns = zip(objective.phases, self._optimizers, self._schedules, strict=True)
        for phase, optimizer, schedule in turns:
            optimizer.zero_grad()
            phase.backward(1, self._generator, 1)
            optimizer.step()
            schedule.step()
        self.steps += 1

    def _encode_prompts(self) -> None:
        """Every phrase in every template with its twin, and a prompt for every retain phrase."""
        config = self._config
        templates = split_templates(config.templates).single
        phrases = target_phrases(config.concepts)
        anchors = [concept.anchor for concept in config.concepts for _ in concept.target]
        forget, twins = (
            [fill(template, phrase) for phrase in words for template in templates]
            for words in (phrases, anchors)
        )
        self._num_prompts = len(forget)
        self._text = embed_in_batches(self._model, [*forget, *twins], ENCODED_AT_ONCE)
        kept = [fill(RETAIN_TEMPLATE, phrase) for phrase in config.retain]
        self._retained = self._model.embed_pooled(kept)
        share = noise_schedule().to(self._model.device)
        self._sigmas = ((1 - share) / share).sqrt()

    def _roll_out(self) -> Pool:
        """One state and the plain model's predictions for it, from a prompt and noise of its own."""
        rng, model = self._rng, self._model
        prompt = rng.randrange(self._num_prompts)
        text = self._text.rows([prompt])
        i = rng.randrange(SAMPLER_STEPS)
        states, levels = model.rollout(
            text,
            steps=SAMPLER_STEPS,
            guidance_scale=GUIDANCE,
            seed=rng.getrandbits(31),
            size=self._config.trajectories.size,
            stop_indices=[steps_before(i)],
        )
        sigma = self._sigmas[rng.randint(*time_range(i))]
        # What the network sees of a state does not depend on the time that it is told.
        latents = states[0] * _input_scale(levels[0]) / _input_scale(sigma)
        with torch.no_grad():
            pair = self._text.rows([prompt, prompt + self._num_prompts])
            plain = model.predict(torch.cat([latents, latents]), sigma.expand(2), pair, None)
        of_prompt, of_twin = plain.float().split(1)
        row = torch.zeros(1, dtype=torch.long)
        encoded = (text.cross, text.pooled, text.host_pooled)
        return Pool(*encoded, row, latents, sigma[None], of_prompt, of_twin)


def _input_scale(sigma: Tensor) -> Tensor:
    """The factor by which a network that predicts noise reads its input."""
    return (sigma.square() + 1).rsqrt()
