"""What a run will cost, from a few of its own steps: ``estimate(config, denoiser)``."""

from __future__ import annotations

import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from unhype import checkpoint
from unhype.checkpoint import to_plain
from unhype.embedding import until_end
from unhype.gate import Gate
from unhype.host.text import TextBatch
from unhype.hypernetwork import EditsHypernetwork, Hypernetwork

from .closed_form import (
    STEPS,
    TEXTS_AT_ONCE,
    Edit,
    Seen,
    factorize,
    kept_gram,
    solve_edits,
    tell_apart,
    texts_to_read,
)
from .config import ConfigError, TrainConfig
from .denoiser import DenoiserLike
from .discovery import PICTURES, STOPS, Speaking
from .gate import GateMaterial, fit_gate, gather
from .loop import Event, Report, Setting, run_loop
from .memory import step_share
from .objectives import MEASURED_BATCHES, Material, Objective, make_objective
from .objectives.oracle import MOST, mean_gradient
from .processes import share_work
from .prompts import PLAIN_TEMPLATE, fill, forget_prompts
from .run import (
    check_trainable,
    describe,
    needs_eta,
    new_hypernetwork,
    prompts_at_once,
    refinement,
)
from .trajectories import Pool, collect, draw

Value = TypeVar("Value")
RolledOut = Callable[[], tuple[float, float, float, Pool]]
"""What ``_trajectories`` measured."""

SAMPLE = 128
"""Prompts that are read to time reading."""
GATE_STEPS = 20
ENOUGH, MOST_REPEATS = 3.0, 5
"""What takes so many seconds is timed once; anything else up to so many times."""
FORWARD_SHARE = 1 / 3
"""Of a training step, what a prediction without a gradient takes."""
ETAS = (MOST + 1) // 2
"""How many are counted on to be tried, from one to MOST."""
MEASURED_LENGTH = 400
"""Bytes of a pack's description that hold measured figures, and so are not known before."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


@dataclass(frozen=True)
class Memory:
    """Bytes: the peak while planning, and what the run is expected to need at most."""

    measured: int
    expected: int


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        step_seconds: what one step of each kind took.
        seconds: what each part of the run is expected to take.
        target_parameters: weights of the layers that get LoRA; they are only read.
        pool_bytes: of the collected trajectories, in memory; ``pool_file_bytes`` on disk, while the run lasts.
        state_bytes: of the file that an interrupted run goes on from.
        pack_bytes: of the finished file: ``weight_bytes`` are exact, the description around them to a few hundred.
        memory, device_memory: of the process, and on its accelerator if there is one.
    """

    device: str
    step_seconds: Mapping[str, float]
    seconds: Mapping[str, float]
    target_modules: int
    target_parameters: int
    hypernetwork_parameters: int
    gate_parameters: int
    pool_bytes: int
    pool_file_bytes: int
    state_bytes: int
    pack_bytes: int
    weight_bytes: int
    memory: Memory
    device_memory: Memory | None

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def estimate(
    config: TrainConfig,
    denoiser: DenoiserLike,
    *,
    load_seconds: float = 0.0,
    progress: Report | None = None,
) -> Plan:
    """Take a few real steps of every stage, at the run's own sizes, and multiply. Nothing is written.

    Args:
        load_seconds: what loading the model took.

    Raises:
        ConfigError: it runs in several processes.
        WrongGradientError: the model cannot be trained with this version of ComfyUI.
    """
    processes = share_work()
    if processes.num_processes > 1:
        raise ConfigError("A plan is made in one process; run it without `accelerate launch`.")
    report = progress or (lambda event: None)
    clock = Clock(denoiser.device)
    rolled_out = cache(lambda: _trajectories(config, denoiser, clock))

    report(Event("reading some prompts", 0, 1))
    texts, material = _gate_texts(config, denoiser)
    sample = random.Random(0).sample(texts, min(SAMPLE, len(texts)))
    prompt, _ = clock.time(lambda: denoiser.embed_pooled(sample))
    prompt /= len(sample)

    report(Event("some steps of the gate", 0, 1))
    few = _changed(config, "gate", steps=GATE_STEPS)
    gate_step, gate = clock.time(lambda: fit_gate(few, material, lambda *_: None))
    gate_step /= GATE_STEPS

    material = material.read_by(gate)
    hypernetwork = new_hypernetwork(config, denoiser, material)
    trained = not isinstance(hypernetwork, EditsHypernetwork) or config.objective.refine
    work = _Work()
    if isinstance(hypernetwork, EditsHypernetwork):
        report(Event("solving for one edit", 0, 1))
        work = _solving(config, denoiser, hypernetwork, material, clock)
    if trained:
        work += _training(config, denoiser, hypernetwork, material, clock, report, rolled_out)
    asking = _discovery(config, denoiser, prompt, rolled_out)
    with (
        torch.no_grad()
    ):  # the largest batch that a run writes LoRA for; it may need more memory than a step
        hypernetwork.generate(
            material.negatives[: prompts_at_once(hypernetwork)].to(denoiser.device)
        ).squared_norm()

    memory, device_memory = _memory(denoiser.device, work.pool_bytes)
    weights, description = _pack_bytes(config, denoiser, hypernetwork, gate)
    return Plan(
        device=str(denoiser.device),
        step_seconds={"reading a prompt": prompt, "gate": gate_step, **work.step_seconds},
        seconds={
            "loading the model": load_seconds,
            "asking for other words": asking,
            "reading prompts": prompt * len(texts),
            "training the gate": gate_step * config.gate.steps,
            **work.seconds,
        },
        target_modules=len(denoiser.targets),
        target_parameters=sum(t.in_features * t.out_features for t in denoiser.targets),
        hypernetwork_parameters=_count(hypernetwork),
        gate_parameters=_count(gate),
        pool_bytes=work.pool_bytes,
        pool_file_bytes=work.pool_file_bytes,
        state_bytes=work.state_bytes,
        pack_bytes=weights + description,
        weight_bytes=weights,
        memory=memory,
        device_memory=device_memory,
    )


@dataclass(frozen=True)
class _Work:
    """What it takes to get the hypernetwork, gate aside."""

    step_seconds: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    pool_bytes: int = 0
    pool_file_bytes: int = 0
    state_bytes: int = 0

    def __add__(self, further: _Work) -> _Work:
        return _Work(
            {**self.step_seconds, **further.step_seconds},
            {**self.seconds, **further.seconds},
            self.pool_bytes + further.pool_bytes,
            self.pool_file_bytes + further.pool_file_bytes,
            self.state_bytes + further.state_bytes,
        )


def _training(
    config: TrainConfig,
    denoiser: DenoiserLike,
    hypernetwork: Hypernetwork,
    material: GateMaterial,
    clock: Clock,
    report: Report,
    rolled_out: RolledOut,
) -> _Work:
    """Take some steps on trajectories."""
    report(Event("some steps of a trajectory", 0, 1))
    rollout_step, _, rollouts, pool = rolled_out()
    at_once = len(pool.prompt)

    report(Event("some steps of training", 0, 1))
    processes = share_work()
    setting = Setting("plan", processes, lambda event: None, threading.Event())
    objective = _objective(config, denoiser, hypernetwork, pool, material)
    check, _ = clock.once(lambda: check_trainable(denoiser, pool))
    eta = _eta(config, objective, clock)
    training_step = _training_step(config, setting, hypernetwork, objective, clock)
    pool_bytes = _pool_bytes(pool, config)
    return _Work(
        step_seconds={"rollout": rollout_step, "training": training_step},
        seconds={
            "collecting trajectories": rollouts,
            "checking the gradient": check,
            "measuring eta": eta,
            "training the hypernetwork": training_step * config.train.steps,
            "drawing samples": rollout_step / at_once * _sample_steps(config),
            "measuring": training_step * FORWARD_SHARE * MEASURED_BATCHES,
        },
        pool_bytes=pool_bytes,
        pool_file_bytes=pool_bytes + header_bytes(pool.tensors(), {}),
        state_bytes=torch.float32.itemsize
        * (
            _count(hypernetwork) * (1 + bool(config.train.ema))
            + 2 * len(objective.phases) * _count(hypernetwork, trained=True)
        ),
    )


@dataclass(frozen=True)
class Clock:
    """Times what a device does."""

    device: torch.device

    def once(self, action: Callable[[], Value]) -> tuple[float, Value]:
        """Seconds, and what the action returned."""
        self._wait()
        begin = time.perf_counter()
        result = action()
        self._wait()
        return time.perf_counter() - begin, result

    def time(self, action: Callable[[], Value]) -> tuple[float, Value]:
        """The same, after a first time to warm up, and the quickest of some if it is quick."""
        seconds, result = self.once(action)
        if seconds < ENOUGH:
            repeats = min(MOST_REPEATS, 1 + int(ENOUGH / max(seconds, 1e-6)))
            timed = [self.once(action) for _ in range(repeats)]
            seconds, result = min(timed, key=lambda one: one[0])
        return seconds, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _gate_texts(config: TrainConfig, denoiser: DenoiserLike) -> tuple[list[str], GateMaterial]:
    """All prompts of the gate, and random vectors in their place: what the gate learns takes no other time."""
    texts: list[str] = []
    generator = torch.Generator().manual_seed(config.seed)

    def note(batch: list[str]) -> Tensor:
        texts.extend(batch)
        dim = denoiser.family.embedding.dim
        if not config.gate.tokens:
            return torch.randn(len(batch), dim, generator=generator)
        counts = torch.tensor([len(ids) - 1 for ids in denoiser.token_ids(batch)])
        rows = torch.randn(len(batch), 1, dim, generator=generator).half()
        return until_end(rows.expand(-1, int(counts.max()) + 1, -1), counts)

    material = gather(config, note)
    return texts, material


def _trajectories(
    config: TrainConfig, denoiser: DenoiserLike, clock: Clock
) -> tuple[float, float, float, Pool]:
    """Seconds of a rollout step, of a prediction and of all rollouts, and a pool of one batch with one state each."""
    settings = config.trajectories
    size = min(settings.batch_size, settings.rollouts)
    rng = random.Random(f"unhype plan {config.seed}")
    pairs = [(p.text, p.anchor) for p in forget_prompts(config, size, rng=rng)]
    short = settings.model_copy(update={"steps": 1, "states": 1})
    first, pool = clock.time(
        lambda: collect(denoiser, pairs, short, seed=config.seed, tick=lambda *_: None)
    )
    text = pool.text.rows(pool.prompt)
    with torch.no_grad():
        prediction, _ = clock.time(lambda: denoiser.predict(pool.latents, pool.sigmas, text, None))
    steps = min(2, settings.steps - 1)
    rollout_step = 0.0
    if steps:
        seconds, _ = clock.time(
            lambda: denoiser.rollout(
                text,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                seed=config.seed,
                size=settings.size,
                stop_indices=[steps],
            )
        )
        rollout_step = seconds / steps
    # The last state lies on average in the middle of the last of the equal stretches; each state is predicted for twice.
    length = settings.steps * (1 - 0.5 / settings.states)
    batch = first + 2 * prediction * (settings.states - 1) + rollout_step * length
    batches = (settings.rollouts + settings.retain_rollouts) / size
    return rollout_step, prediction, batch * batches, pool


def _objective(
    config: TrainConfig,
    denoiser: DenoiserLike,
    hypernetwork: Hypernetwork,
    pool: Pool,
    material: GateMaterial,
) -> Objective:
    retain = pool if config.trajectories.retain_rollouts else None
    drawn_from = Material(pool, retain, material.negatives.to(denoiser.device))
    if isinstance(hypernetwork, EditsHypernetwork):
        anything = torch.eye(hypernetwork.down.shape[-1])
        return refinement(config, denoiser, hypernetwork, drawn_from, anything)
    return make_objective(
        config.objective, hypernetwork=hypernetwork, denoiser=denoiser, material=drawn_from
    )


def _solving(
    config: TrainConfig,
    denoiser: DenoiserLike,
    hypernetwork: EditsHypernetwork,
    material: GateMaterial,
    clock: Clock,
) -> _Work:
    """Solve for one edit, with few sentences of what stays; sentences and edits then count."""
    few = _changed(config, "objective", preserved=1).model_copy(
        update={"concepts": config.concepts[:1]}
    )
    sentences = [fill(PLAIN_TEMPLATE, phrase) for phrase in config.retain[:TEXTS_AT_ONCE]]
    reading, _ = clock.time(lambda: denoiser.embed(sentences))
    reading /= len(sentences)
    weighing, seen = clock.once(lambda: Seen.of(denoiser.target_weights()))

    def solve_one() -> tuple[Tensor, list[Edit]]:
        kept = kept_gram(few, denoiser)
        return kept, solve_edits(few, denoiser, seen, kept, lambda *_: None)

    one, (_, edits) = clock.time(solve_one)
    algebra = max(0.0, one - reading * texts_to_read(few))
    num = len(config.concepts)
    writing, _ = clock.once(lambda: factorize(hypernetwork, edits * num, seen))
    telling, _ = clock.once(
        lambda: tell_apart(hypernetwork, material, config.seed, steps=GATE_STEPS)
    )
    return _Work(
        step_seconds={"edit": one},
        seconds={
            "reading sentences": reading * texts_to_read(config),
            "solving for edits": weighing + algebra * num + writing + telling * STEPS / GATE_STEPS,
        },
    )


def _discovery(
    config: TrainConfig, denoiser: DenoiserLike, prompt: float, rolled_out: RolledOut
) -> float:
    """Seconds of asking for other words, from those of reading a prompt."""
    settings = config.discovery
    if not settings.words or not isinstance(denoiser, Speaking):
        return 0.0
    step, prediction, _, pool = rolled_out()
    step, prediction = step / len(pool.prompt), prediction / len(pool.prompt)
    words = min(settings.words, len(denoiser.words()))
    asked = min(settings.candidates, words) + 2  # the concept and its anchor, too
    steps, predictions = PICTURES * STOPS[-1], PICTURES * len(STOPS) * asked
    each = step * steps + prediction * predictions
    return prompt * words + len(config.concepts) * each


def _sample_steps(config: TrainConfig) -> int:
    """Rollout steps of all sample pictures: the plain ones, and those of each grid."""
    settings = config.samples
    grids = math.ceil(config.train.steps / settings.every)
    pictures = (grids + 1) * len(settings.prompts)
    return pictures * settings.steps


def _eta(config: TrainConfig, objective: Objective, clock: Clock) -> float:
    """Seconds that measuring eta takes, if the run does: as many descents as are counted on."""
    if not needs_eta(objective, config):
        return 0.0
    size = config.train.batch_size
    batch = draw(objective.material.forget, size, torch.Generator().manual_seed(config.seed))
    share, theta = step_share(size), objective.start()

    def descend() -> None:
        share.attempt(lambda at_once: mean_gradient(objective, batch, theta, at_once))

    seconds, _ = clock.time(descend)
    return seconds * (MEASURED_BATCHES + ETAS * (objective.num_steps + MEASURED_BATCHES))


def _training_step(
    config: TrainConfig,
    setting: Setting,
    hypernetwork: Hypernetwork,
    objective: Objective,
    clock: Clock,
) -> float:
    """Seconds of a step of the run's own loop."""
    # Nothing beside the output has this name, and so few steps are not saved: nothing is read or written.
    nowhere = config.output.with_name(f".{config.output.stem}.plan.safetensors")

    def run(num: int) -> None:
        few = _changed(config, "train", steps=num, save_every=num)
        run_loop(few.model_copy(update={"output": nowhere}), setting, hypernetwork, objective)

    seconds, _ = clock.once(lambda: run(1))
    if seconds < ENOUGH:
        seconds = clock.once(lambda: run(MOST_REPEATS))[0] / MOST_REPEATS
    return seconds


def _pool_bytes(pool: Pool, config: TrainConfig) -> int:
    """What the pools of a whole run hold, from one with one state a prompt."""
    settings = config.trajectories
    of_prompt = {field.name for field in fields(TextBatch)}
    one = sum(
        tensor.nbytes // len(tensor) * (1 if name in of_prompt else settings.states)
        for name, tensor in pool.tensors().items()
    )
    return one * (settings.rollouts + settings.retain_rollouts)


def _pack_bytes(
    config: TrainConfig, denoiser: DenoiserLike, hypernetwork: Hypernetwork, gate: Gate
) -> tuple[int, int]:
    """Sizes of a pack's weights and of the description before them."""
    stored = {
        checkpoint.HYPERNETWORK + name: value.to(
            "meta", value.dtype if name.startswith("standardize.") else checkpoint.STORED
        )
        for name, value in hypernetwork.state_dict().items()
    } | {checkpoint.GATE + name: value.to("meta") for name, value in gate.state_dict().items()}
    info = to_plain(describe(config, denoiser, hypernetwork, gate))
    described = {checkpoint.CONFIG_KEY: json.dumps(info)}
    return sum(value.nbytes for value in stored.values()), (
        header_bytes(stored, described) + MEASURED_LENGTH
    )


def header_bytes(tensors: Mapping[str, Tensor], described: Mapping[str, str]) -> int:
    """Size of what a safetensors file holds before its tensors."""
    header: dict[str, object] = {"__metadata__": described} if described else {}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8


def _memory(device: torch.device, pool_bytes: int) -> tuple[Memory, Memory | None]:
    """Host and device; the whole pool comes on top of what was measured, and a copy of it while it is written."""
    host = _peak_rss()
    if device.type != "cuda":
        return Memory(host, host + 2 * pool_bytes), None
    reserved = torch.cuda.max_memory_reserved(device)
    return Memory(host, host + pool_bytes), Memory(reserved, reserved + pool_bytes)


def _peak_rss() -> int:
    """The most memory, in bytes, that this process has had."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _changed(config: TrainConfig, section: str, **values: object) -> TrainConfig:
    """The config with some values of a section replaced."""
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def _count(module: torch.nn.Module, *, trained: bool = False) -> int:
    """Numbers in it, or only in what is trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
