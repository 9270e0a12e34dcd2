"""What a run keeps of its steps beside the pack: a metrics file, and events for TensorBoard."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from . import state
from .config import ConfigError, TrainConfig
from .denoiser import DenoiserLike
from .loop import Recorder, Setting, Step
from .samples import Samples

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def metrics_path(output: Path) -> Path:
    """Where the metrics of the run that writes ``output`` are."""
    return output.with_suffix(".metrics.jsonl")


def events_path(output: Path) -> Path:
    """The folder of its events for TensorBoard."""
    return output.with_suffix(".tensorboard")


def recorders(
    config: TrainConfig, denoiser: DenoiserLike, setting: Setting
) -> tuple[Recorder, ...]:
    """What the config asks for; nothing but in the main process.

    Raises:
        ConfigError: the model cannot draw the samples asked for.
    """
    if not setting.processes.is_main_process:
        return ()
    chosen: list[Recorder] = []
    if config.log.every:
        chosen.append(Metrics(config, denoiser, setting))
    if config.log.tensorboard:
        chosen.append(TensorBoard(config))
    if config.samples.prompts:
        chosen.append(Samples(config, denoiser))
    return tuple(chosen)


def check_tensorboard(config: TrainConfig) -> None:
    """Refuse before the work what cannot be written.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    if not config.log.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401  (imports the package)
    except ImportError as error:
        raise ConfigError(
            f"log.tensorboard is true, but TensorBoard cannot be imported ({error}). Install it with "
            "`pip install tensorboard`, or set log.tensorboard to false: the metrics file has the same figures."
        ) from error


class Metrics:
    """A line of JSON a step, after a first one that says which run it is."""

    def __init__(self, config: TrainConfig, denoiser: DenoiserLike, setting: Setting) -> None:
        self._path = metrics_path(config.output)
        self._every = config.log.every
        self._first = {
            "run": setting.key,
            "config": config.digest(),
            "seed": config.seed,
            "model": denoiser.fingerprint.name,
            "device": str(denoiser.device),
            "processes": setting.processes.num_processes,
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("unhype", "torch", "accelerate")},
            },
        }

    def begin(self, done: int) -> None:
        with state.writing(self._path):
            with self._path.open("ab") as file:
                file.truncate(self._whole_length(done) if done else 0)
            if not self._path.stat().st_size:
                self._write(self._first)

    def record(self, step: Step) -> None:
        if not step.is_due(self._every):
            return
        seconds = round(step.seconds, 6)
        line = {"step": step.number, **step.values, **step.rates, "seconds": seconds}
        with state.writing(self._path):
            self._write(line)

    def _write(self, line: dict[str, object]) -> None:
        # Opened for every line, so that it is whole whenever the run ends.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _whole_length(self, done: int) -> int:
        """Bytes of the file up to a step, if it is of this run."""
        length = 0
        with self._path.open("rb") as file:
            for line in file:
                try:
                    read = json.loads(line)
                except ValueError:  # of a run that was killed while it wrote
                    break
                if not isinstance(read, dict) or not line.endswith(b"\n"):
                    break
                if not length and read.get("run") != self._first["run"]:
                    break
                if read.get("step", 0) > done:
                    break
                length += len(line)
        return length


class TensorBoard:
    """The same figures as events."""

    def __init__(self, config: TrainConfig) -> None:
        self._path = events_path(config.output)
        self._every = config.log.every or 1
        self._writer: SummaryWriter | None = None

    def begin(self, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with state.writing(self._path):
            self._writer = SummaryWriter(str(self._path), purge_step=done + 1)

    def record(self, step: Step) -> None:
        if self._writer is None or not step.is_due(self._every):
            return
        with state.writing(self._path):
            figures = {**step.values, **step.rates, "seconds": step.seconds}
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step.number)
            self._writer.flush()
