"""Running out of memory costs time: the same samples, fewer of them at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from train import state
from train.config import TrainConfig
from train.memory import Share, TooLittleMemoryError, is_out_of_memory
from train.objectives import Material, Objective, make_objective
from train.record import metrics_path
from train.run import Event, train
from train.trajectories import collect
from unhype.host.text import TextBatch
from unhype.hypernetwork import Architecture, HypernetworkConfig, make_hypernetwork
from unhype.lora import LoRAFactors

from .conftest import FAMILY, TinyDenoiser

Make = Callable[..., TrainConfig]
PROMPTS = [
    ("a photo of a cat", "a photo of an empty meadow"),
    ("a kitty", "an empty meadow"),
    ("a cat and a dog", "an empty meadow and a dog"),
    ("the cat", "the empty meadow"),
    ("a drawing of a cat", "a drawing of an empty meadow"),
]


class TightDenoiser(TinyDenoiser):
    """Has memory for ``room`` samples with LoRA and for ``plain_room`` without."""

    def __init__(self, room: int, plain_room: int = 1000) -> None:
        super().__init__()
        self.room, self.plain_room = room, plain_room
        self.refused = 0

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        if len(x_t) > (self.plain_room if factors is None else self.room):
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().predict(x_t, sigma, text, factors)


class FullDenoiser(TinyDenoiser):
    """Has memory for LoRA of rank 1, which the gradient is checked with, and for no other."""

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        if factors is not None and factors.down[0].shape[1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().predict(x_t, sigma, text, factors)


class GreedyDenoiser(TinyDenoiser):
    """Asks the CPU's allocator for far too much with every batch of more than two."""

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        if len(x_t) > 2:
            torch.empty(2**50)
        return super().predict(x_t, sigma, text, factors)


def make_one(config: TrainConfig, denoiser: TinyDenoiser) -> Objective:
    """An objective with states of target and retain prompts, whose hypernetwork has left its start."""
    torch.manual_seed(0)
    forget = collect(denoiser, PROMPTS, config.trajectories, seed=0, tick=lambda *_: None)
    same = [("a dog", "a dog"), ("a bus", "a bus"), ("a tree", "a tree")]
    retain = collect(denoiser, same, config.trajectories, seed=1, tick=lambda *_: None)
    sizes = HypernetworkConfig(
        Architecture.HEADS, FAMILY.embedding.dim, rank=2, hidden_dim=8, num_steps=20
    )
    hypernetwork = make_hypernetwork(sizes, denoiser.targets)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    kept = denoiser.embed_pooled([text for text, _ in same])
    return make_objective(
        config.objective,
        hypernetwork=hypernetwork,
        denoiser=denoiser,
        material=Material(forget, retain, kept),
    )


EVERY_OBJECTIVE = [
    ("objective.function_retention=0.5", "trajectories.retain_rollouts=3"),
    ("objective.name=joint", "objective.eta=0.3"),
    ("objective.name=joint", "objective.eta=0.3", "objective.separate_retention=false"),
    ("objective.name=matching", "objective.eta=0.3"),
]


@pytest.mark.parametrize("overrides", EVERY_OBJECTIVE, ids=lambda o: o[0] + o[-1])
@pytest.mark.parametrize("parts", [2, 3, 5, 9])
def test_a_gradient_in_parts_is_that_of_the_whole(
    make: Make, denoiser: TinyDenoiser, overrides: tuple[str, ...], parts: int
) -> None:
    objective = make_one(make(*overrides), denoiser)
    network = getattr(objective, "hypernetwork")  # noqa: B009  (every objective has one)
    for phase in objective.phases:
        found = []
        for number in (1, parts):
            network.zero_grad()
            generator = torch.Generator().manual_seed(4)
            values = phase.backward(5, generator, number)
            gradient = torch.cat(
                [p.grad.flatten() for p in network.parameters() if p.grad is not None]
            )
            found.append((values, gradient, torch.rand(1, generator=generator)))
        (whole, gradient, after), (values, in_parts, after_parts) = found
        assert values == pytest.approx(whole, rel=1e-4)
        assert (in_parts - gradient).norm() <= 1e-4 * gradient.norm()
        assert gradient.norm() > 0
        assert torch.equal(after, after_parts)


@pytest.mark.parametrize("name", ["direct", "joint", "matching"])
def test_a_tight_run_ends_where_a_roomy_one_does(make: Make, name: str) -> None:
    config = make(f"objective.name={name}", "network.num_steps=10", "train.batch_size=7")
    losses = []
    for room in (1000, 2):
        metrics = train(config, denoiser=TightDenoiser(room)).metrics
        lines = metrics_path(config.output).read_text().splitlines()[1:]
        losses.append(([json.loads(line)["loss"] for line in lines], metrics["erase_loss"]))
    (roomy, end), (tight, tight_end) = losses
    assert len(roomy) == 12
    assert tight == pytest.approx(roomy, rel=1e-3)
    assert tight_end == pytest.approx(end, rel=1e-3)


def test_it_is_told_once_for_every_size(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    denoiser = TightDenoiser(2)
    with caplog.at_level(logging.WARNING, "unhype"):
        train(make("train.batch_size=7"), denoiser=denoiser)
    told = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert [" ".join(text.split()[:5]) for text in told] == [
        "Out of memory with 7",
        "Out of memory with 4",
    ]
    assert "going on with 2 at once" in told[-1]
    assert denoiser.refused == 2


def test_a_resumed_run_goes_on_in_parts(make: Make) -> None:
    def die(event: Event) -> None:
        if event.values and event.step == 8:
            raise KeyboardInterrupt

    config = make()
    train(config, denoiser=TightDenoiser(2))
    whole = state.read(config.output)[0]
    with pytest.raises(KeyboardInterrupt):
        train(config, denoiser=TightDenoiser(2), progress=die)
    again = TightDenoiser(2)
    train(config, denoiser=again)
    assert not again.refused
    resumed = state.read(config.output)[0]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_too_little_for_one_ends_in_a_sentence(make: Make) -> None:
    with pytest.raises(
        TooLittleMemoryError, match=r"not even one at a time fits\. Lower trajectories\.size"
    ):
        train(make(), denoiser=FullDenoiser())


def test_the_cpus_allocator_is_understood(make: Make) -> None:
    config = make("trajectories.batch_size=4")
    train(config, denoiser=GreedyDenoiser())
    assert config.output.exists()


def test_rollouts_go_on_in_smaller_batches(make: Make) -> None:
    denoiser = TightDenoiser(1000, plain_room=2)
    settings = make("trajectories.batch_size=5").trajectories
    ticks: list[tuple[int, int]] = []
    pool = collect(denoiser, PROMPTS, settings, seed=0, tick=lambda *at: ticks.append(at))
    assert denoiser.refused == 2  # five and three
    assert ticks == [(2, 5), (4, 5), (5, 5)]
    assert sorted(pool.prompt.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for row, prompt in enumerate(pool.prompt.tolist()):
        text = denoiser.embed([PROMPTS[prompt][0]])
        latents, sigma = pool.latents[row : row + 1], pool.sigmas[row : row + 1]
        torch.testing.assert_close(
            denoiser.predict(latents, sigma, text, None)[0], pool.prediction[row]
        )


def test_rollouts_without_room_for_one_end_in_a_sentence(make: Make) -> None:
    with pytest.raises(TooLittleMemoryError, match=r"pictures of a rollout.*trajectories\.size"):
        train(make(), denoiser=TightDenoiser(1000, plain_room=0))


def test_other_errors_are_no_lack_of_memory() -> None:
    share = Share(4, "things", "")

    def fail(at_once: int) -> None:
        raise RuntimeError(f"{at_once} shapes do not fit")

    with pytest.raises(RuntimeError, match="4 shapes do not fit"):
        share.attempt(fail)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
