"""Plans of the objectives that do more than one step a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from torch import Tensor

from train import state
from train.config import TrainConfig
from train.plan import estimate
from train.run import Event, InertError, train
from unhype.host.text import TextBatch
from unhype.lora import LoRAFactors

from .conftest import TinyDenoiser

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.ema=0.9",),
        ("objective.name=joint",),
        ("objective.name=joint", "objective.separate_retention=false"),
        ("objective.name=matching", "objective.eta=1e-2", "train.ema=0.9"),
    ],
    ids=" ".join,
)
def test_the_size_of_the_state(
    make: Make, denoiser: TinyDenoiser, overrides: tuple[str, ...]
) -> None:
    config = make(*overrides, "train.steps=6")
    sizes: list[int] = []

    def look(event: Event) -> None:
        if event.values and event.step == 6:  # the state is of step 5
            sizes.append(state.state_path(config.output).stat().st_size)

    planned = estimate(config, denoiser)
    with suppress(InertError):  # so few steps may do too little
        train(config, denoiser=denoiser, progress=look)
    assert planned.state_bytes == pytest.approx(sizes[0], rel=0.15)


class SlowDenoiser(TinyDenoiser):
    """Every prediction takes its time, which a busy machine hardly changes."""

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        time.sleep(0.02)
        return super().predict(x_t, sigma, text, factors)


def test_the_time_to_measure_eta(make: Make) -> None:
    steps = ("network.num_steps=20", "objective.name=matching")
    given = estimate(make(*steps, "objective.eta=1e-2"), SlowDenoiser())
    assert given.seconds["measuring eta"] == 0
    measured = estimate(make(*steps), SlowDenoiser())
    gradients = 8 + 4 * (20 + 8)  # one survey, and four descents with theirs
    assert 1 < measured.seconds["measuring eta"] / (0.02 * gradients) < 2


def test_the_time_to_draw_samples(make: Make) -> None:
    config = make('samples.prompts=["a cat", "a dog"]', "samples.every=5", "trajectories.steps=10")
    planned = estimate(config, SlowDenoiser())
    pictures = 2 * (1 + 3)  # without LoRA, and at steps 5, 10 and 12
    batches = pictures / config.trajectories.batch_size
    assert 1 < planned.seconds["drawing samples"] / (0.02 * batches * 20) < 2


class SlowSpeaker(SlowDenoiser):
    """Has words, too."""

    def words(self) -> list[str]:
        return [f"word{number}" for number in range(200)]


def test_the_time_to_ask_for_other_words(make: Make) -> None:
    config = make("discovery.words=100", "discovery.candidates=8", "trajectories.steps=10")
    stage = "asking for other words"
    assert estimate(make(), SlowSpeaker()).seconds[stage] == 0
    assert estimate(config, SlowDenoiser()).seconds[stage] == 0  # has no words
    pictures = 4 * 6 + 16 * (
        8 + 2
    )  # rollouts, and predictions for a word, the concept or its anchor
    batches = len(config.concepts) * pictures / config.trajectories.batch_size
    assert 1 < estimate(config, SlowSpeaker()).seconds[stage] / (0.02 * batches) < 2
