"""Run by torch.distributed.run: a broken and resumed run must equal an unbroken one in two processes, too."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from train import state
from train.config import make_config
from train.loop import STAGE
from train.run import Event, TrainingInterrupted, train

spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def stop_this_one(event: Event) -> None:
    """Only the main process reports, so only it is asked to stop; the other must follow."""
    if event.stage == STAGE and event.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


folder = Path(sys.argv[1])
whole, broken = (
    make_config(
        {**tiny.small_data(folder), "output": str(folder / f"{name}.safetensors")}, sys.argv[2:]
    )
    for name in ("whole", "broken")
)
denoiser = tiny.TinyDenoiser()
train(whole, denoiser=denoiser)
try:
    train(broken, denoiser=denoiser, progress=stop_this_one)
except TrainingInterrupted:
    processes = PartialState()
    processes.wait_for_everyone()
    (folder / f"stopped{processes.process_index}").touch()
train(broken, denoiser=denoiser)
first, second = (state.read(config.output)[0] for config in (whole, broken))
assert all(torch.equal(first[name], second[name]) for name in first)
PartialState().destroy_process_group()
