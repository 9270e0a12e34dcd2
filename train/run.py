"""One training run, from a config to a pack: ``train(config)``."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TypeGuard

import torch
from accelerate import PartialState
from torch import Tensor

from unhype import checkpoint
from unhype.checkpoint import ConceptInfo, PackInfo
from unhype.families import Branch
from unhype.gate import Gate
from unhype.host.denoise import Denoiser
from unhype.hypernetwork import (
    Architecture,
    EditsHypernetwork,
    Hypernetwork,
    HypernetworkConfig,
    make_hypernetwork,
)

from . import state
from .calibrate import in_batches
from .closed_form import edit_in_closed_form
from .config import ConfigError, ObjectiveName, TrainConfig, TrajectoryConfig, settle_files
from .denoiser import DenoiserLike, check_gradient, files_of
from .discovery import describe as describe_words
from .discovery import discover, widen
from .gate import GateMaterial, gather, surest, train_gate
from .loop import (
    STAGE,
    Event,
    Report,
    Setting,
    Step,
    TrainingDivergedError,
    TrainingInterrupted,
    average,
    run_loop,
    stop_requests,
)
from .memory import Share
from .objectives import (
    Descent,
    InertError,
    Material,
    Objective,
    Refinement,
    Trajectory,
    check_alive,
    find_eta,
    make_objective,
)
from .processes import share_work
from .prompts import ForgetPrompt, forget_prompts, retain_prompts, split_vocabulary
from .record import check_tensorboard, recorders
from .trajectories import Pool, collect

__all__ = ["Event", "InertError", "Result", "TrainingDivergedError", "TrainingInterrupted", "train"]

log = logging.getLogger("unhype")

EMBEDDED_AT_ONCE = 256
LORA_BYTES_AT_ONCE = 2**28
"""Of the LoRA that is written to be measured; that of one prompt takes up to 40 MiB."""
CORNER = 8
"""Side of the part of a state that the gradient is tried on; small, to be fast."""
POOL_SETTINGS = {
    "concepts": True,
    "retain": True,
    "retain_captions": True,
    "templates": True,
    "seed": True,
    "trajectories": True,
    "text_encoders": True,
    "gate": {"held_back": True},
}
"""What the trajectories depend on."""


@dataclass(frozen=True)
class Result:
    """A finished run: its pack, the wall-clock seconds it took, and what was measured."""

    path: Path
    seconds: float
    metrics: Mapping[str, float]


def train(
    config: TrainConfig,
    *,
    progress: Report | None = None,
    comfyui: Path | None = None,
    denoiser: DenoiserLike | None = None,
) -> Result:
    """Train a pack and write it to ``config.output``.

    An interrupted run leaves its state beside the output, and the same config goes on from there. Under
    ``accelerate launch`` the processes share the trajectories, and each step averages their batches.

    Args:
        progress: told of every step of every stage.
        comfyui: where ComfyUI is, if it is not to be looked for.
        denoiser: the frozen model, if it is not to be loaded from the config's files.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came.
        TrainingDivergedError: the loss is no finite number.
        InertError: the objective left the network without effect.
        TooLittleMemoryError: not even one sample at a time fits.
        WrongGradientError: the model cannot be trained with this version of ComfyUI.
    """
    begin = time.monotonic()
    with started(config, progress=progress, comfyui=comfyui, denoiser=denoiser) as run:
        denoiser, report, processes = run.denoiser, run.report, run.processes
        _refuse_unsolvable(config, denoiser)
        _warn_of_unused(config, denoiser)
        setting = run.setting(config, _run_key(config, denoiser))

        discovered = discover(config, denoiser, ticker(report, "asking for other words"))
        given, config = config, widen(config, discovered)
        material = gather(config, embedder(denoiser, report, tokens=config.gate.tokens))
        gate, calibration = train_gate(config, material, ticker(report, "training the gate"))
        setting = replace(setting, gate=gate)
        material = material.read_by(gate)
        hypernetwork = new_hypernetwork(config, denoiser, material)
        if isinstance(hypernetwork, EditsHypernetwork):
            figures = find_edits(config, denoiser, setting, hypernetwork, (material, gate))
        else:
            figures = _train_hypernetwork(config, denoiser, setting, hypernetwork, (material, gate))

    metrics = {**figures, **lora_norms(hypernetwork, material)}
    if config.objective.name is ObjectiveName.MATCHING:
        _refuse_inert(config, processes, metrics)
    words = {}
    if config.discovery.words:
        words = {"discovered": describe_words(discovered, config.concepts)}
    info = replace(
        describe(given, denoiser, hypernetwork, gate),
        concepts=tuple(ConceptInfo(c.name, c.target, c.anchor) for c in config.concepts),
        calibration=calibration,
        metrics={**metrics, **words},
    )
    finish(config, processes, info, hypernetwork, gate)
    return Result(config.output, time.monotonic() - begin, metrics)


def _train_hypernetwork(
    config: TrainConfig,
    denoiser: DenoiserLike,
    setting: Setting,
    hypernetwork: Hypernetwork,
    reading: tuple[GateMaterial, Gate],
) -> Mapping[str, float]:
    """Train it on trajectories, step by step; what was measured."""
    material, gate = reading
    forget, retain = collect_pools(config, denoiser, setting, gate)
    check_trainable(denoiser, forget)
    objective = make_objective(
        config.objective,
        hypernetwork=hypernetwork,
        denoiser=denoiser,
        material=Material(forget, retain, material.negatives.to(denoiser.device)),
    )
    objective, found = _with_eta(config, setting, objective)
    share = run_loop(config, setting, hypernetwork, objective)
    return {**measure_in_parts(config, objective, share), **found}


def find_edits(
    config: TrainConfig,
    denoiser: DenoiserLike,
    setting: Setting,
    hypernetwork: EditsHypernetwork,
    reading: tuple[GateMaterial, Gate],
) -> Mapping[str, float]:
    """Solve for the edits, and refine them if the config says so; what was measured.

    Args:
        reading: prompts that ask for the concepts, and the gate that reads them.
    """
    begin = time.perf_counter()
    material, gate = reading
    tick = ticker(setting.report, "solving for edits")
    kept = edit_in_closed_form(config, denoiser, hypernetwork, material, tick)
    if config.objective.refine:
        return _refine(config, denoiser, setting, hypernetwork, gate, kept)
    done = Step(1, 1, {}, {}, time.perf_counter() - begin, hypernetwork)
    for recorder in setting.recorders:
        recorder.begin(0)
        recorder.record(done)
    return {}


def _refine(
    config: TrainConfig,
    denoiser: DenoiserLike,
    setting: Setting,
    hypernetwork: EditsHypernetwork,
    gate: Gate,
    kept: Tensor,
) -> Mapping[str, float]:
    """Train solved edits on trajectories; which concept a prompt asks for is known already."""
    forget, retain = collect_pools(config, denoiser, setting, gate)
    check_trainable(denoiser, forget)
    material = Material(forget, retain, forget.pooled)
    objective = refinement(config, denoiser, hypernetwork, material, kept)
    share = run_loop(config, setting, hypernetwork, objective)
    return measure_in_parts(config, objective, share)


def refinement(
    config: TrainConfig,
    denoiser: DenoiserLike,
    hypernetwork: EditsHypernetwork,
    material: Material,
    kept: Tensor,
) -> Refinement:
    """The objective of refining; all but what tells the concepts apart is left to train. ``kept`` is (dim, dim)."""
    for name, parameter in hypernetwork.named_parameters():
        parameter.requires_grad_(not name.startswith("trunk."))
    kept = kept.to(denoiser.device, torch.float32)
    return Refinement.of(config.objective, hypernetwork, denoiser, material, kept)


@dataclass(frozen=True)
class Started:
    """A run whose model is loaded.

    Attributes:
        processes: this process among those that share the work.
        report: told of progress; it also ends the run, before its training, once ``stop`` is set.
    """

    denoiser: DenoiserLike
    processes: PartialState
    report: Report
    stop: threading.Event

    def setting(self, config: TrainConfig, key: str) -> Setting:
        """What its loop happens in; a state with another ``key`` is not continued."""
        setting = Setting(key, self.processes, self.report, self.stop)
        return replace(setting, recorders=recorders(config, self.denoiser, setting))


@contextmanager
def started(
    config: TrainConfig,
    *,
    progress: Report | None,
    comfyui: Path | None,
    denoiser: DenoiserLike | None,
) -> Iterator[Started]:
    """Refuse early what cannot be written, load the model if there is none, and let signals stop the work inside."""
    check_writable(config.output)
    check_tensorboard(config)
    # Gives each process its own device; before the model is loaded.
    processes = share_work()
    with stop_requests() as stop:

        def report(event: Event) -> None:
            if progress is not None and processes.is_main_process:
                progress(event)
            if stop.is_set() and event.stage != STAGE:
                raise TrainingInterrupted(
                    f"Interrupted while {event.stage}, before training began. Run the same command to start again."
                )

        report(Event("loading the model", 0, 1))
        pictures = bool(config.samples.prompts)
        denoiser = denoiser or Denoiser.load(files_of(config), comfyui, pictures=pictures)
        report(Event("loading the model", 1, 1))
        yield Started(denoiser, processes, report, stop)


def describe(
    config: TrainConfig, denoiser: DenoiserLike, hypernetwork: Hypernetwork, gate: Gate
) -> PackInfo:
    """What a run's pack says of itself, without what is measured."""
    return PackInfo(
        family=denoiser.family.name,
        base=denoiser.fingerprint,
        hypernetwork=hypernetwork.config,
        targets=denoiser.targets,
        gate=gate.config,
        concepts=tuple(ConceptInfo(c.name, c.target, c.anchor) for c in config.concepts),
        training=config.plain(),
        training_digest=config.digest(),
        version=metadata.version("unhype"),
        license=config.license,
    )


def needs_eta(objective: Objective, config: TrainConfig) -> TypeGuard[Trajectory]:
    """Whether a run measures the objective's eta before it trains."""
    return isinstance(objective, Trajectory) and config.objective.eta == "auto"


def _refuse_unsolvable(config: TrainConfig, denoiser: DenoiserLike) -> None:
    """Closed form needs layers that read the text's states alone."""
    if config.objective.name is ObjectiveName.CLOSED_FORM and not denoiser.family.per_chunk:
        raise ConfigError(
            f"objective.name is closed-form, but {denoiser.family.title} has no layers that read the text's states alone. "
            "Use objective.name direct."
        )


def _warn_of_unused(config: TrainConfig, denoiser: DenoiserLike) -> None:
    scale, default = config.trajectories.guidance_scale, TrajectoryConfig().guidance_scale
    if denoiser.family.branch is Branch.ALL and scale != default:
        log.warning(
            "trajectories.guidance_scale is %g, but %s is sampled without guidance: it is not used.",
            scale,
            denoiser.family.title,
        )


def measure_in_parts(
    config: TrainConfig, objective: Objective, share: Share
) -> Mapping[str, float]:
    """The objective's figures, in as many parts as training had."""
    size = config.train.batch_size

    def attempt(at_once: int) -> Mapping[str, float]:
        generator = torch.Generator().manual_seed(config.seed)
        return objective.measure(size, generator, math.ceil(size / at_once))

    return share.attempt(attempt)


def finish(
    config: TrainConfig,
    processes: PartialState,
    info: PackInfo,
    hypernetwork: Hypernetwork,
    gate: Gate,
) -> None:
    """Write the pack, then drop the state: whatever happens in between, one of the two is whole."""
    index = processes.process_index
    if processes.is_main_process:
        with state.writing(config.output):
            checkpoint.save(config.output, info, hypernetwork.cpu(), gate)
        state.state_path(config.output).unlink(missing_ok=True)
    state.eta_path(config.output, index).unlink(missing_ok=True)
    if not config.trajectories.keep:
        state.pool_path(config.output, index).unlink(missing_ok=True)
    processes.wait_for_everyone()


def _with_eta(
    config: TrainConfig, setting: Setting, objective: Objective
) -> tuple[Objective, dict[str, float]]:
    """The objective with its eta measured, or kept from before, where it is to be; and what was found, for the pack."""
    if not needs_eta(objective, config):
        return objective, {}
    processes = setting.processes
    path = state.eta_path(config.output, processes.process_index)
    kept, key = state.read(path) if path.exists() else ({}, {})
    known = torch.tensor(float(key.get(state.KEY) == setting.key), device=processes.device)
    if average(known, processes) == 1:  # in all processes, for all must take part in the search
        found = Descent(float(kept["eta"]), float(kept["loss"]))
    else:
        found = find_eta(
            objective,
            config.train.batch_size,
            seed=config.seed,
            average=lambda tensor: average(tensor, processes),
            tick=ticker(setting.report, "measuring eta"),
        )
        values = {"eta": found.eta, "loss": found.loss}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        state.write(path, tensors, {state.KEY: setting.key})
    return replace(objective, eta=found.eta), {"eta": found.eta, "oracle_loss": found.loss}


def _refuse_inert(
    config: TrainConfig, processes: PartialState, metrics: Mapping[str, float]
) -> None:
    """Let a network without effect end in an error, and leave nothing that other settings could trip over."""
    values = torch.tensor(list(metrics.values()), device=processes.device)
    shared = dict(zip(metrics, average(values, processes).tolist(), strict=True))
    try:
        check_alive(config.objective, shared)
    except InertError:
        state.eta_path(config.output, processes.process_index).unlink(missing_ok=True)
        state.state_path(config.output).unlink(missing_ok=True)
        raise


def check_trainable(denoiser: DenoiserLike, pool: Pool) -> None:
    """Make sure of the gradient on the corner of a state."""
    text = pool.text.rows(pool.prompt[:1])
    check_gradient(denoiser, pool.latents[:1, :, :CORNER, :CORNER], pool.sigmas[:1], text)


def collect_pools(
    config: TrainConfig, denoiser: DenoiserLike, setting: Setting, gate: Gate
) -> tuple[Pool, Pool | None]:
    """This process's states for forget prompts and, if wanted, for retain prompts; from the disk where they are kept.

    Args:
        gate: says which vector of a prompt the hypernetwork is to read, if the gate reads them all.
    """
    forget, retain = _pools_read_at_ends(config, denoiser, setting)
    if not gate.config.tokens:
        return forget, retain
    own = slice(setting.processes.process_index, None, setting.processes.num_processes)
    read = embedder(denoiser, setting.report, tokens=True)
    prompts, others = _pool_prompts(config)
    concepts = torch.tensor([prompt.concept for prompt in prompts[own]])
    vectors = surest(gate, read([prompt.text for prompt in prompts[own]]).cpu(), concepts)
    forget = replace(forget, pooled=vectors.to(forget.pooled))
    if retain is not None:
        vectors = surest(gate, read(others[own]).cpu())
        retain = replace(retain, pooled=vectors.to(retain.pooled))
    return forget, retain


def _pools_read_at_ends(
    config: TrainConfig, denoiser: DenoiserLike, setting: Setting
) -> tuple[Pool, Pool | None]:
    """The same with the vectors of the prompts' ends."""
    settings, processes = config.trajectories, setting.processes
    index, num = processes.process_index, processes.num_processes
    if min(settings.rollouts, settings.retain_rollouts or settings.rollouts) < num:
        raise ConfigError(
            f"trajectories.rollouts and retain_rollouts must give each of {num} processes at least one, "
            f"got {settings.rollouts} and {settings.retain_rollouts}."
        )
    path = state.pool_path(config.output, index)
    key = f"{_pool_digest(config)}/{denoiser.fingerprint.digest}/{index}/{num}"
    if kept := _kept_pools(path, key, denoiser.device):
        return kept
    prompts, others = _pool_prompts(config)

    def roll_out(name: str, pairs: list[tuple[str, str]], seed: int) -> Pool:
        tick = ticker(setting.report, f"collecting trajectories{name}")
        return collect(denoiser, pairs[index::num], settings, seed=seed, tick=tick)

    seed = config.seed + 2 * index
    forget = roll_out("", [(p.text, p.anchor) for p in prompts], seed)
    retain = roll_out(" to keep", [(p, p) for p in others], seed + 1) if others else None
    tensors = {f"forget/{name}": value for name, value in forget.tensors().items()}
    if retain is not None:
        tensors |= {f"retain/{name}": value for name, value in retain.tensors().items()}
    state.write(path, tensors, {state.KEY: key})
    return forget, retain


def _pool_prompts(config: TrainConfig) -> tuple[list[ForgetPrompt], list[str]]:
    """Forget prompts and retain prompts of all processes."""
    settings, rng = config.trajectories, random.Random(f"unhype pool {config.seed}")
    prompts = forget_prompts(config, settings.rollouts, rng=rng, plain_first=_plain_first(config))
    words, _ = split_vocabulary(config, rng=rng)
    return prompts, retain_prompts(config, words, settings.retain_rollouts, rng=rng)


def _kept_pools(path: Path, key: str, device: torch.device) -> tuple[Pool, Pool | None] | None:
    """The pools that a run with this key wrote, if it did."""
    if not path.exists():
        return None
    tensors, found = state.read(path)
    if found.get(state.KEY) != key:
        return None

    def pool(prefix: str) -> Pool | None:
        parts = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        moved = {name: t if name == "prompt" else t.to(device) for name, t in parts.items()}
        return Pool(**moved) if moved else None

    forget = pool("forget/")
    return (forget, pool("retain/")) if forget is not None else None


def _run_key(config: TrainConfig, denoiser: DenoiserLike) -> str:
    """Of a state that goes on: what it was trained with, on what, and on which kind of prompts."""
    kind = "/plain first" if _plain_first(config) else ""
    return f"{config.digest()}/{denoiser.fingerprint.digest}{kind}"


def _plain_first(config: TrainConfig) -> bool:
    """Whether states of the plainest prompts must be among those trained on; closed form has solved for these already."""
    return config.objective.name is not ObjectiveName.CLOSED_FORM


def _pool_digest(config: TrainConfig) -> str:
    """Hash of every setting that the trajectories depend on, and of what a pool holds."""
    settings = settle_files(config.model_dump(mode="json", include=POOL_SETTINGS))
    settings["plain_first"] = _plain_first(config)
    described = json.dumps([settings, [field.name for field in fields(Pool)]], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def new_hypernetwork(
    config: TrainConfig, denoiser: DenoiserLike, material: GateMaterial
) -> Hypernetwork:
    """An untrained one, of the config's sizes and seed, that knows the spread of the prompts."""
    settings = config.network
    sizes = HypernetworkConfig(
        settings.architecture,
        embedding_dim=material.positives.shape[1],
        rank=settings.rank,
        hidden_dim=settings.hidden_dim,
        num_steps=settings.num_steps,
    )
    if settings.architecture is Architecture.EDITS:
        num = len(config.concepts)
        directions = min(settings.directions, settings.rank * num)
        sizes = replace(sizes, num_concepts=num, directions=directions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        hypernetwork = make_hypernetwork(sizes, denoiser.targets)
    hypernetwork.standardize.fit(torch.cat([material.positives, material.negatives]))
    return hypernetwork.to(denoiser.device)


def prompts_at_once(hypernetwork: Hypernetwork) -> int:
    """For how many prompts the LoRA is written to be measured."""
    rank = hypernetwork.config.rank
    numbers = sum(rank * (t.in_features + t.out_features) for t in hypernetwork.targets)
    fitting = LORA_BYTES_AT_ONCE // (torch.float32.itemsize * numbers)
    return min(EMBEDDED_AT_ONCE, max(1, fitting))


@torch.no_grad()
def lora_norms(hypernetwork: Hypernetwork, material: GateMaterial) -> dict[str, float]:
    """Mean |dW| of target prompts, retain prompts, and retain prompts of words that training never saw; gate aside."""
    device = next(hypernetwork.parameters()).device
    groups = {
        "target": material.held_positives,
        "retain": material.negatives[: 2 * len(material.held_negatives)],
        "retain_held_back": material.held_negatives,
    }
    norms = {}
    for name, embeddings in groups.items():
        squared = [
            hypernetwork.generate(part.to(device)).squared_norm()
            for part in embeddings.split(prompts_at_once(hypernetwork))
        ]
        norms[f"lora_norm_{name}"] = torch.cat(squared).sqrt().mean().item()
    return norms


def embedder(
    denoiser: DenoiserLike, report: Report, *, tokens: bool
) -> Callable[[list[str]], Tensor]:
    """Pooled embeddings, or those of all tokens, with progress."""
    read = denoiser.embed_tokens if tokens else denoiser.embed_pooled
    return in_batches(read, EMBEDDED_AT_ONCE, ticker(report, "reading prompts"))


def ticker(report: Report, stage: str) -> Callable[[int, int], None]:
    return lambda step, total: report(Event(stage, step, total))


def check_writable(output: Path) -> None:
    """Refuse before the work, not after it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.with_name(output.name + ".part")
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written ({error.strerror}). Give an output in a folder that you may write to."
        ) from error
