"""The training loop: flat, resumable, and the same in one process and in several."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unhype.gate import Gate
from unhype.hypernetwork import Hypernetwork

from . import state
from .config import OptimizerConfig, TrainConfig
from .memory import Share, step_share
from .objectives import Objective, Phase

STAGE = "training the hypernetwork"
UNIT = "unit"
"""Of an optimizer's group: what its learning rate is multiplied with."""


@dataclass(frozen=True)
class Event:
    """Progress: ``step`` of ``total`` in a stage, and the values of a training step."""

    stage: str
    step: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)


class TrainingInterrupted(Exception):  # noqa: N818  (not an error: the run can go on)
    """The run was asked to stop."""


class TrainingDivergedError(RuntimeError):
    """The loss is not a finite number any more."""


Report = Callable[[Event], None]


@dataclass(frozen=True)
class Step:
    """A finished training step, of ``total``.

    Attributes:
        rates: learning rate of each optimizer.
        hypernetwork: as the run would end now.
        gate: that it will stand behind.
    """

    number: int
    total: int
    values: Mapping[str, float]
    rates: Mapping[str, float]
    seconds: float
    hypernetwork: Hypernetwork
    gate: Gate | None = None

    def is_due(self, every: int) -> bool:
        """Whether something is to be done now that is done every so many steps, and at the last."""
        return self.number % every == 0 or self.number == self.total


class Recorder(Protocol):
    """Keeps something of every step, in the main process alone."""

    def begin(self, done: int) -> None:
        """The run goes on from a number of steps; what is kept of later ones is of no use."""
        ...

    def record(self, step: Step) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What a run happens in.

    Attributes:
        key: of the run; a state with another key is not continued.
        processes: this process among those that share the work.
        stop: set when the run is asked to stop.
        recorders: told of every training step, before its state is saved.
        gate: of the pack that will be, once it is trained.
    """

    key: str
    processes: PartialState
    report: Report
    stop: threading.Event
    recorders: Sequence[Recorder] = ()
    gate: Gate | None = None


def run_loop(
    config: TrainConfig, setting: Setting, hypernetwork: Hypernetwork, objective: Objective
) -> Share:
    """Train the hypernetwork in place, from the saved state if there is one.

    The randomness of a step depends on the seed, the step and the process alone, so a resumed run equals an unbroken one.
    Where memory runs out, the phase is repeated in parts: the same samples, and the same gradient up to rounding.

    Returns:
        How many samples fit into memory at once.

    Raises:
        TrainingInterrupted: ``setting.stop`` was set; the state is saved.
        TrainingDivergedError: the loss is no finite number.
        TooLittleMemoryError: not even one sample at once fits.
    """
    settings, processes = config.train, setting.processes
    parameters = [p for p in hypernetwork.parameters() if p.requires_grad]
    optimizers = {
        f"optimizer{number or ''}": torch.optim.AdamW(
            [{"params": [p], UNIT: _size(p) if phase.relative else 1.0} for p in parameters],
            weight_decay=settings.weight_decay,
            fused=parameters[0].is_cuda,
        )
        for number, phase in enumerate(objective.phases)
    }
    turns = [
        (phase, name, optimizer)
        for phase, (name, optimizer) in zip(objective.phases, optimizers.items(), strict=True)
        for _ in range(phase.repeats)
    ]
    modules: dict[str, nn.Module] = {"hypernetwork": hypernetwork}
    averaged = None
    if settings.ema:
        averaged = AveragedModel(hypernetwork, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        modules["averaged"] = averaged
    path = state.state_path(config.output)
    start = state.load_state(path, key=setting.key, modules=modules, optimizers=optimizers)
    share = step_share(start.at_once or settings.batch_size)
    for recorder in setting.recorders:
        recorder.begin(start.step)

    for step in range(start.step, settings.steps):
        began = time.perf_counter()
        generator = _generator(config.seed, step, processes.process_index)
        values: dict[str, float] = {"loss": 0.0}
        rates: dict[str, float] = {}
        for phase, name, optimizer in turns:
            rate = _learning_rate(settings, phase.lr or settings.lr, step)
            rates[name.replace("optimizer", "lr")] = rate
            for group in optimizer.param_groups:
                group["lr"] = rate * group[UNIT]
            named = _add_gradient(phase, optimizer, settings.batch_size, generator, share)
            values |= {**named, "loss": values["loss"] + named["loss"]}
            if not math.isfinite(values["loss"]):
                raise TrainingDivergedError(
                    f"The loss is {values['loss']} at step {step + 1}. Lower train.lr (now {settings.lr}) or "
                    f"objective.negative_guidance, and delete {path} if it is there: it holds a state of this run."
                )
            _average_gradients(parameters, processes)
            size = nn.utils.clip_grad_norm_(parameters, settings.clip)
            if not torch.isfinite(size):
                raise TrainingDivergedError(
                    f"The gradient is {float(size)} at step {step + 1}, the loss {values['loss']:g}. Lower train.lr (now {settings.lr}), or, "
                    "where ComfyUI keeps the model in half precision, give a file in bf16 or fp32. "
                    f"The state in {path}, if there is one, is from before."
                )
            optimizer.step()
        if averaged is not None:
            averaged.update_parameters(hypernetwork)
        done = step + 1
        if setting.recorders:
            seconds = time.perf_counter() - began
            current = hypernetwork if averaged is None else cast(Hypernetwork, averaged.module)
            for recorder in setting.recorders:
                recorder.record(
                    Step(done, settings.steps, values, rates, seconds, current, setting.gate)
                )
        setting.report(Event(STAGE, done, settings.steps, values))
        stopped = _anyone(setting.stop.is_set(), processes) and done < settings.steps
        if processes.is_main_process and (
            stopped or (done % settings.save_every == 0 and done < settings.steps)
        ):
            at_once = share.at_once if share.at_once < settings.batch_size else None
            position = state.Position(done, at_once)
            state.save_state(
                path, key=setting.key, position=position, modules=modules, optimizers=optimizers
            )
        if stopped:
            raise TrainingInterrupted(
                f"Interrupted at step {done} of {settings.steps}. Run the same command again to go on."
            )
    if averaged is not None:
        hypernetwork.load_state_dict(averaged.module.state_dict())
    return share


def _add_gradient(
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    generator: torch.Generator,
    share: Share,
) -> Mapping[str, float]:
    """Let a phase write its gradient anew, in as many parts as memory asks for, from the same draws."""
    drawn = generator.get_state()

    def attempt(at_once: int) -> Mapping[str, float]:
        generator.set_state(drawn)
        optimizer.zero_grad()
        return phase.backward(batch_size, generator, math.ceil(batch_size / at_once))

    return share.attempt(attempt)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that a step is never cut in two; a second one ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _size(parameter: Tensor) -> float:
    """Root mean square of the elements."""
    return parameter.detach().square().mean().sqrt().item()


def _learning_rate(settings: OptimizerConfig, highest: float, step: int) -> float:
    """Linear warmup, then cosine down to ``final_lr`` of the highest."""
    if step < settings.warmup:
        return highest * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return highest * (settings.final_lr + (1 - settings.final_lr) * cosine)


def _generator(seed: int, step: int, process: int) -> torch.Generator:
    # By name, not by sum: the CPU generator reads 32 bits, and neighboring runs must not share draws.
    drawn = random.Random(f"unhype step {seed} {step} {process}").getrandbits(32)
    return torch.Generator().manual_seed(drawn)


def average(tensor: Tensor, processes: PartialState) -> Tensor:
    """The mean over all processes."""
    if processes.num_processes == 1:
        return tensor
    return reduce(tensor, reduction="mean")  # pyright: ignore[reportReturnType]


def _average_gradients(parameters: list[nn.Parameter], processes: PartialState) -> None:
    """Give every process the mean of all processes' gradients."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = average(parameter.grad, processes)


def _anyone(yes: bool, processes: PartialState) -> bool:
    """Whether one of the processes says yes; they must agree, or the others would wait for it forever."""
    if processes.num_processes == 1:
        return yes
    votes = reduce(torch.tensor(float(yes), device=processes.device), reduction="sum")
    return float(votes) > 0  # pyright: ignore[reportArgumentType]
