"""One training run, from a config to a pack: ``train(config)``."""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unhype import checkpoint
from unhype.checkpoint import ConceptInfo, PackInfo
from unhype.gate import Gate
from unhype.host.denoise import Denoiser
from unhype.hypernetwork import Hypernetwork, HypernetworkConfig, make_hypernetwork

from . import state
from .config import ConfigError, OptimizerConfig, TrainConfig
from .denoiser import DenoiserLike
from .gate import GateMaterial, gather, train_gate
from .objectives import Material, Objective, make_objective
from .prompts import forget_prompts, retain_prompts, split_vocabulary
from .trajectories import Pool, collect

RECENT = 20
"""Steps whose mean loss is recorded as the final one."""


@dataclass(frozen=True)
class Event:
    """Progress: ``step`` of ``total`` in a stage, and the values of a training step."""

    stage: str
    step: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A finished run: its pack, the wall-clock seconds it took, and what was measured."""

    path: Path
    seconds: float
    metrics: Mapping[str, float]


class TrainingInterrupted(Exception):  # noqa: N818  (not an error: the run can go on)
    """The run was asked to stop and has written its state."""


class TrainingDivergedError(RuntimeError):
    """The loss is not a finite number any more."""


Report = Callable[[Event], None]


def train(
    config: TrainConfig,
    *,
    progress: Report | None = None,
    comfyui: Path | None = None,
    denoiser: DenoiserLike | None = None,
) -> Result:
    """Train a pack and write it to ``config.output``.

    An interrupted run leaves its state beside the output, and the same config goes on from there.

    Args:
        progress: told of every step of every stage.
        comfyui: where ComfyUI is, if it is not to be looked for.
        denoiser: the frozen model, if it is not to be loaded from ``config.checkpoint``.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came while the hypernetwork trained.
        TrainingDivergedError: the loss is no finite number.
    """
    report = progress or (lambda event: None)
    begin = time.monotonic()
    _check_writable(config.output)
    report(Event("loading the model", 0, 1))
    denoiser = denoiser or Denoiser.load(config.checkpoint, comfyui)
    report(Event("loading the model", 1, 1))

    material = gather(config, _embedder(denoiser, report))
    gate, calibration = train_gate(config, material, _ticker(report, "training the gate"))
    hypernetwork = _new_hypernetwork(config, denoiser, material)
    pools = _pools(config, denoiser, report)
    objective = make_objective(
        config.objective,
        hypernetwork=hypernetwork,
        denoiser=denoiser,
        material=Material(*pools, retain_embeddings=material.negatives.to(_device(hypernetwork))),
    )
    losses = run_loop(config, hypernetwork, objective, report)

    metrics = {
        **{f"final_{name}": value for name, value in losses.items()},
        **_norms(hypernetwork, gate, material),
    }
    info = PackInfo(
        family=denoiser.family.name,
        base=denoiser.fingerprint,
        hypernetwork=hypernetwork.config,
        targets=denoiser.targets,
        gate=gate.config,
        concepts=tuple(ConceptInfo(c.name, c.target, c.anchor) for c in config.concepts),
        calibration=calibration,
        training=config.plain(),
        training_digest=config.digest(),
        metrics=metrics,
        version=metadata.version("unhype"),
        license=config.license,
    )
    checkpoint.save(config.output, info, hypernetwork.cpu(), gate)
    state.state_path(config.output).unlink(missing_ok=True)
    if not config.trajectories.keep:
        state.pool_path(config.output).unlink(missing_ok=True)
    return Result(config.output, time.monotonic() - begin, metrics)


def run_loop(
    config: TrainConfig, hypernetwork: Hypernetwork, objective: Objective, report: Report
) -> dict[str, float]:
    """Train the hypernetwork in place; the mean values of the last steps."""
    settings = config.train
    optimizer = torch.optim.AdamW(
        hypernetwork.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = _schedule(settings)
    generator = torch.Generator().manual_seed(config.seed)
    averaged = AveragedModel(hypernetwork, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    modules: dict[str, nn.Module] = {"hypernetwork": hypernetwork, "averaged": averaged}
    path, digest = state.state_path(config.output), config.digest()
    start = state.load_state(
        path, digest=digest, modules=modules, optimizer=optimizer, generator=generator
    )
    recent: list[Mapping[str, float]] = []

    def save(step: int) -> None:
        states = {name: module.state_dict() for name, module in modules.items()}
        state.save_state(
            path, digest=digest, step=step, modules=states, optimizer=optimizer, generator=generator
        )

    with _stop_requests() as stop:
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            optimizer.zero_grad()
            values = objective.backward(settings.batch_size, generator)
            if not math.isfinite(values["loss"]):
                raise TrainingDivergedError(
                    f"The loss is {values['loss']} at step {step + 1}. Lower train.lr (now {settings.lr}) or "
                    f"objective.negative_guidance; the state of an earlier step is in {path}, delete it to start afresh."
                )
            nn.utils.clip_grad_norm_(hypernetwork.parameters(), settings.clip)
            optimizer.step()
            averaged.update_parameters(hypernetwork)
            recent = [*recent[1 - RECENT :], values]
            report(Event("training the hypernetwork", step + 1, settings.steps, values))
            done = step + 1 == settings.steps
            if stop.is_set() and not done:
                save(step + 1)
                raise TrainingInterrupted(
                    f"Interrupted at step {step + 1} of {settings.steps}. Run the same command again to go on."
                )
            if not done and (step + 1) % settings.save_every == 0:
                save(step + 1)
    if settings.ema:
        hypernetwork.load_state_dict(averaged.module.state_dict())
    names = recent[-1].keys() if recent else ()
    return {name: statistics.fmean(values[name] for values in recent) for name in names}


def _schedule(settings: OptimizerConfig) -> Callable[[int], float]:
    """Learning rate by step: linear warmup, then cosine down to ``final_lr`` of it."""

    def at(step: int) -> float:
        if step < settings.warmup:
            return settings.lr * (step + 1) / settings.warmup
        share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return settings.lr * (settings.final_lr + (1 - settings.final_lr) * cosine)

    return at


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set inside the block, so that a step is never cut in two."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pools(config: TrainConfig, denoiser: DenoiserLike, report: Report) -> tuple[Pool, Pool | None]:
    """States for the forget prompts and, if wanted, for retain prompts; from the disk where they are kept."""
    path, digest = state.pool_path(config.output), _pool_digest(config)
    settings = config.trajectories
    if path.exists():
        tensors, found = state.read(path)
        if found.get(state.DIGEST) == digest:
            forget, retain = (
                {
                    name.removeprefix(prefix): t
                    for name, t in tensors.items()
                    if name.startswith(prefix)
                }
                for prefix in ("forget/", "retain/")
            )
            return _pool(forget, denoiser), _pool(retain, denoiser) if retain else None
    rng = random.Random(f"unhype pool {config.seed}")
    prompts = [(p.text, p.anchor) for p in forget_prompts(config, settings.rollouts, rng=rng)]
    tick = _ticker(report, "collecting trajectories")
    forget = collect(denoiser, prompts, settings, seed=config.seed, tick=tick)
    retain = None
    if settings.retain_rollouts:
        words, _ = split_vocabulary(config, rng=rng)
        kept = retain_prompts(config, words, settings.retain_rollouts, rng=rng)
        tick = _ticker(report, "collecting trajectories to keep")
        retain = collect(
            denoiser, [(p, p) for p in kept], settings, seed=config.seed + 1, tick=tick
        )
    tensors = {f"forget/{name}": value for name, value in forget.tensors().items()}
    if retain is not None:
        tensors |= {f"retain/{name}": value for name, value in retain.tensors().items()}
    state.write(path, tensors, {state.DIGEST: digest})
    return forget, retain


def _pool(tensors: dict[str, Tensor], denoiser: DenoiserLike) -> Pool:
    """The tensors of a pool, back on the model's device."""
    device = denoiser.embed([""]).cross.device
    return Pool(**{n: t if n == "prompt" else t.to(device) for n, t in tensors.items()})


def _pool_digest(config: TrainConfig) -> str:
    """Hash of every setting that the trajectories depend on."""
    kept = config.model_dump(
        mode="json",
        include={
            "checkpoint",
            "concepts",
            "retain",
            "retain_captions",
            "templates",
            "seed",
            "trajectories",
        },
    )
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _new_hypernetwork(
    config: TrainConfig, denoiser: DenoiserLike, material: GateMaterial
) -> Hypernetwork:
    settings = config.network
    sizes = HypernetworkConfig(
        settings.architecture,
        embedding_dim=material.positives.shape[1],
        rank=settings.rank,
        hidden_dim=settings.hidden_dim,
        num_steps=settings.num_steps,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        hypernetwork = make_hypernetwork(sizes, denoiser.targets)
    hypernetwork.standardize.fit(torch.cat([material.positives, material.negatives]))
    return hypernetwork.to(denoiser.embed([""]).pooled.device)


@torch.no_grad()
def _norms(hypernetwork: Hypernetwork, gate: Gate, material: GateMaterial) -> dict[str, float]:
    """Mean |dW| before the gate, for held-back target prompts and for held-back retain prompts."""
    device = _device(hypernetwork)
    return {
        f"lora_norm_{name}": hypernetwork.generate(embeddings.to(device))
        .squared_norm()
        .sqrt()
        .mean()
        .item()
        for name, embeddings in (
            ("target", material.held_positives),
            ("retain", material.held_negatives),
        )
    }


def _embedder(denoiser: DenoiserLike, report: Report) -> Callable[[list[str]], Tensor]:
    """Pooled embeddings with progress."""
    tick, size = _ticker(report, "reading prompts"), 256

    def embed(texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), size):
            parts.append(denoiser.embed_pooled(texts[start : start + size]).cpu())
            tick(min(start + size, len(texts)), len(texts))
        return torch.cat(parts)

    return embed


def _ticker(report: Report, stage: str) -> Callable[[int, int], None]:
    return lambda step, total: report(Event(stage, step, total))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _check_writable(output: Path) -> None:
    """Refuse before the work, not after it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(output.name + ".part")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written ({error.strerror}). Give an output in a folder that you may write to."
        ) from error
