"""Plans, against the runs that they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from train import loop, plan, run, state
from train.config import TrainConfig
from train.plan import estimate, header_bytes
from train.run import train
from unhype.host.text import TextBatch
from unhype.lora import LoRAFactors

from .conftest import TinyDenoiser

Make = Callable[..., TrainConfig]


def tensor_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in state.read(path)[0].values())


@pytest.mark.parametrize("architecture", ["atoms", "heads"])
def test_the_size_of_the_pack(make: Make, denoiser: TinyDenoiser, architecture: str) -> None:
    config = make(f"network.architecture={architecture}")
    planned = estimate(config, denoiser)
    path = train(config, denoiser=denoiser).path
    assert planned.weight_bytes == tensor_bytes(path)
    assert planned.pack_bytes == pytest.approx(path.stat().st_size, abs=300)


@pytest.mark.parametrize("retain_rollouts", [0, 4])
def test_the_size_of_the_trajectories(
    make: Make, denoiser: TinyDenoiser, retain_rollouts: int
) -> None:
    config = make("trajectories.keep=true", f"trajectories.retain_rollouts={retain_rollouts}")
    planned = estimate(config, denoiser)
    train(config, denoiser=denoiser)
    path = state.pool_path(config.output)
    assert planned.pool_bytes == tensor_bytes(path)
    assert planned.pool_file_bytes == pytest.approx(path.stat().st_size, abs=2000)


def test_what_a_file_holds_before_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"größe": torch.zeros(3, 5), "half": torch.zeros(7, dtype=torch.float16)}
    save_file(tensors, path, {"key": 'a "word" in {braces}'})
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert header_bytes(tensors, {"key": 'a "word" in {braces}'}) == path.stat().st_size - held


def test_the_counts(make: Make, denoiser: TinyDenoiser) -> None:
    config = make()
    planned = estimate(config, denoiser)
    with safe_open(train(config, denoiser=denoiser).path, "pt") as file:
        gate = [file.get_tensor(n).numel() for n in file.keys() if n.startswith("gate.layers")]  # noqa: SIM118
    assert planned.gate_parameters == sum(gate)
    assert planned.target_modules == len(denoiser.targets) == 4
    assert planned.target_parameters == 4 * 16 * 24
    assert planned.hypernetwork_parameters > 4 * 4 * (16 + 24)


class Clock:
    """Time that goes on only while a prediction is made, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class SlowDenoiser(TinyDenoiser):
    """Every prediction takes 20 ms of the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def predict(
        self, x_t: Tensor, sigma: Tensor, text: TextBatch, factors: LoRAFactors | None
    ) -> Tensor:
        self._clock.now += 0.02
        return super().predict(x_t, sigma, text, factors)


def test_the_time_is_about_what_the_run_takes(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in (plan, run, loop):
        monkeypatch.setattr(module, "time", clock)
    config = make("trajectories.steps=10", "train.steps=40", "gate.steps=20")
    planned = estimate(config, SlowDenoiser(clock), load_seconds=100)
    taken = train(config, denoiser=SlowDenoiser(clock)).seconds
    assert taken / 1.25 < planned.total_seconds - 100 < 1.25 * taken
    assert 0.02 <= planned.step_seconds["rollout"] < 0.06
    assert 0.02 <= planned.step_seconds["training"] < 0.06


def test_nothing_is_written_or_disturbed(
    make: Make, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    config = make(f"output={tmp_path / 'new' / 'pack.safetensors'}")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    planned = estimate(config, denoiser)
    assert torch.equal(before, torch.get_rng_state())
    assert not list(tmp_path.iterdir())
    assert planned.memory.expected >= planned.memory.measured > 2**20
    assert planned.device_memory is None


def test_what_is_measured_is_told(make: Make, denoiser: TinyDenoiser) -> None:
    stages: list[str] = []
    estimate(make(), denoiser, progress=lambda event: stages.append(event.stage))
    assert len(stages) == len(set(stages)) == 4
