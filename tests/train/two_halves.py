"""Run by one process or by several whose batches together are the same: they must learn the same.

``two_halves.py FOLDER SIZE``, with SIZE samples a step for each process. First each process takes its rows of a batch that
all draw, which must agree up to rounding; then a whole run, in which each draws from its own trajectories.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from train import state
from train.config import make_config
from train.loop import Event, Setting, run_loop
from train.objectives import Phase, dial
from train.run import train
from train.trajectories import Pool, collect, draw
from unhype.hypernetwork import Architecture, Hypernetwork, HypernetworkConfig, make_hypernetwork

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
SETTINGS = ["train.steps=100", "train.lr=1e-2", "objective.weight_retention=1e-5", "log.every=0"]


@dataclass(frozen=True)
class OwnRows:
    """Regression at s = S on this process's rows of a batch that all of them draw."""

    pool: Pool
    hypernetwork: Hypernetwork
    seeds: Iterator[int] = field(default_factory=itertools.count)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.backward),)

    def backward(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        common = torch.Generator().manual_seed(next(self.seeds))
        whole = draw(self.pool, batch_size * processes.num_processes, common)
        start = batch_size * processes.process_index
        batch = whole.part(slice(start, start + batch_size))
        factors = self.hypernetwork.generate(batch.text.pooled)
        prediction = denoiser.predict(batch.latents, batch.sigmas, batch.text, factors)
        wanted = dial(batch, torch.ones(batch_size), 1.0)
        loss = torch.nn.functional.mse_loss(prediction, wanted)
        loss.backward()
        return {"loss": float(loss.detach())}

    def measure(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        return {}


def train_on_common_batches() -> list[float]:
    """The losses of this process."""
    prompts = [("a photo of a cat", "a photo of an empty meadow"), ("a kitty", "an empty meadow")]
    pool = collect(denoiser, prompts, config.trajectories, seed=0, tick=lambda *_: None)
    torch.manual_seed(0)
    sizes = HypernetworkConfig(Architecture.ATOMS, tiny.FAMILY.embedding.dim, 4, 16)
    hypernetwork = make_hypernetwork(sizes, denoiser.targets)
    losses: list[float] = []

    def report(event: Event) -> None:
        losses.append(event.values["loss"])

    setting = Setting("common", processes, report, threading.Event())
    run_loop(config, setting, hypernetwork, OwnRows(pool, hypernetwork))
    state.state_path(config.output).unlink(missing_ok=True)
    return losses


processes = PartialState(cpu=True)
folder, num = Path(sys.argv[1]), processes.num_processes
config = make_config(
    {**tiny.small_data(folder), "output": str(folder / f"of{num}.safetensors")},
    [f"train.batch_size={sys.argv[2]}", *SETTINGS],
)
denoiser = tiny.TinyDenoiser()
losses = train_on_common_batches()
(folder / f"of{num}.{processes.process_index}.json").write_text(json.dumps(losses))
processes.wait_for_everyone()
train(config, denoiser=denoiser)
if num > 1:
    processes.destroy_process_group()
