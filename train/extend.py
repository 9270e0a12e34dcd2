"""More concepts for a trained pack, or fewer, without training from the beginning: ``extend`` and ``remove``."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from unhype import checkpoint
from unhype.checkpoint import Calibration, ConceptInfo, Pack, PackInfo, to_plain
from unhype.embedding import cat_prompts
from unhype.gate import Gate
from unhype.hypernetwork import Architecture, EditsHypernetwork, Hypernetwork, make_hypernetwork
from unhype.lora import LoRAFactors

from . import state
from .calibrate import target_prompts
from .config import (
    EDITS_DEFAULTS,
    ConfigError,
    NetworkConfig,
    ObjectiveConfig,
    ObjectiveName,
    TrainConfig,
    for_whole_lora,
    in_closed_form,
    make_config,
)
from .denoiser import DenoiserLike, check_family
from .extend_edits import first_and_last, grow_edits, new_edits, tell_new_apart, without_edits
from .gate import Embed, GateMaterial, gather, surest, train_gate
from .loop import Report, Setting, run_loop
from .objectives import Material, Phase
from .objectives.base import accumulate
from .objectives.direct import Direct
from .phrases import forms, mentions, normal
from .prompts import forget_prompts, target_phrases
from .run import (
    check_trainable,
    check_writable,
    collect_pools,
    embedder,
    find_edits,
    finish,
    lora_norms,
    measure_in_parts,
    prompts_at_once,
    started,
    ticker,
)
from .shorthand import ordinary_words

log = logging.getLogger("unhype")

KEPT_PROMPTS = 300
"""Prompts of each old concept whose LoRA is held."""
KEPT_NOISE = 0.5
"""Standard deviation of the noise on half of their standardized embeddings: wordings that no template has."""
LIMIT = 0.1
"""Mean relative change of an old concept's LoRA beyond which no pack is written."""


class MovedError(ValueError):
    """An extension has changed what the pack does to a concept that it erased before."""


@dataclass(frozen=True)
class Growth:
    """How a pack is extended.

    Attributes:
        atoms: appended to each layer; networks of ``heads`` keep their sizes.
        keep_weight: factor of the relative squared change of the old concepts' LoRA.
        force: write the pack even if they have changed by more than ``LIMIT``.
    """

    atoms: int = 8
    keep_weight: float = 10.0
    force: bool = False


@dataclass(frozen=True)
class Change:
    """|dW - dW_old| / |dW_old| over an old concept's prompts, in templates that no training uses.

    Attributes:
        mean, worst: at s = S, as the nodes use it.
        halfway: mean at s = S / 2.
    """

    mean: float
    worst: float
    halfway: float


@dataclass(frozen=True)
class Extended:
    """An extended pack.

    Attributes:
        changes: of the old concepts by name.
        gate_difference: the most that an old concept's probability differs for any prompt tried.
    """

    path: Path
    seconds: float
    changes: Mapping[str, Change]
    gate_difference: float
    metrics: Mapping[str, object]


@dataclass(frozen=True)
class Extension:
    """The direct objective for new concepts, and for prompts c of the old ones, which need no denoiser:

    lambda_k mean |dW(c, s) - dW_old(c, s)|_F^2 / mean |dW_old(c, S)|_F^2
    """

    direct: Direct
    old: Hypernetwork
    kept: Tensor  # (prompts, embedding_dim)
    weight: float
    unit: float  # mean |dW_old(c, S)|_F^2

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.backward),)

    def backward(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        values = self.direct.backward(batch_size, generator, parts)
        size = self.direct.config.retain_batch_size
        chosen = torch.randint(len(self.kept), (size,), generator=generator)
        noise = KEPT_NOISE * torch.randn(size, self.kept.shape[1], generator=generator)
        noise[: size // 2] = 0
        c = self.kept[chosen.to(self.kept.device)]
        c = c + noise.to(c) * self.old.standardize.std
        s = self.direct.positions(size, generator).to(c.device)

        def keep(part: slice) -> Tensor:
            with torch.no_grad():
                before = self.old.generate(c[part], s[part])
            after = self.direct.hypernetwork.generate(c[part], s[part])
            return difference(after, before).squared_norm().mean() / self.unit

        kept = accumulate(size, parts, keep, self.weight)
        return {**values, "loss": values["loss"] + self.weight * kept, "keep": kept}

    def measure(
        self, batch_size: int, generator: torch.Generator, parts: int = 1
    ) -> Mapping[str, float]:
        return self.direct.measure(batch_size, generator, parts)


def extend(
    path: Path,
    config: TrainConfig,
    *,
    growth: Growth | None = None,
    progress: Report | None = None,
    comfyui: Path | None = None,
    denoiser: DenoiserLike | None = None,
) -> Extended:
    """Teach a pack the config's concepts beside its own, and write both to ``config.output``.

    Interrupted, it goes on with the same arguments, as training does.

    Args:
        path: of the pack; it stays as it is.
        config: of the new concepts. Network, S, threshold and strengths are the pack's.
        progress, comfyui, denoiser: as for :func:`train.run.train`.

    Raises:
        ConfigError: the config does not go with the pack.
        MovedError: an old concept's LoRA has changed too much.
        TrainingInterrupted: SIGINT or SIGTERM came.
        TrainingDivergedError: the loss is no finite number.
    """
    begin = time.monotonic()
    growth = growth or Growth()
    pack = checkpoint.load(path)
    config = fitting(pack, config)
    _refuse_same(path, config.output)
    with started(config, progress=progress, comfyui=comfyui, denoiser=denoiser) as run:
        denoiser, report, processes = run.denoiser, run.report, run.processes
        _check_base(pack, denoiser)
        setting = run.setting(config, _key(path, config, denoiser, growth))
        embed = embedder(denoiser, report, tokens=config.gate.tokens)
        material = gather(config, embed)
        prompts = _kept_prompts(pack.info, config)
        kept = embed(prompts).cpu()
        check = _check_material(pack.info, config, embed)

        part, _ = train_gate(
            config, _with_others(material, kept, config), ticker(report, "training the gate")
        )
        gate = join_gates(pack.gate, part)
        setting = replace(setting, gate=part)
        asking, kept = material.read_by(part), surest(pack.gate, kept)
        old = pack.hypernetwork.to(denoiser.device)
        if isinstance(old, EditsHypernetwork):
            added = new_edits(old, config).to(denoiser.device)
            figures = find_edits(config, denoiser, setting, added, (asking, part))
            hypernetwork = grow_edits(old, added)
            tell_new_apart(hypernetwork, old, asking, kept, config.seed)
            old, hypernetwork = (h.to(denoiser.device) for h in (old, hypernetwork))
        else:
            hypernetwork = grow(old, growth.atoms, config.seed).to(denoiser.device)
            figures = _train_further(
                config, denoiser, setting, (old, hypernetwork), (asking, kept, part), growth
            )

    _round_to_stored(hypernetwork)
    vectors = surest(pack.gate, check.embeddings, check.concept)
    heard_by_old = replace(check, embeddings=vectors)
    changes = _changes(hypernetwork, old, heard_by_old, pack.info.concept_names)
    gate_difference = _gate_difference(
        gate, pack.gate, cat_prompts([check.embeddings, material.held_negatives])
    )
    metrics: dict[str, object] = {
        **figures,
        **lora_norms(hypernetwork, asking),
        "extension": {
            "pack": pack.name,
            "base": denoiser.fingerprint.name,
            "added": [concept.name for concept in config.concepts],
            "changes": {name: asdict(change) for name, change in changes.items()},
            "gate_difference": gate_difference,
        },
    }
    if not growth.force:
        _refuse_moved(changes, config, growth, processes)
    calibration = _calibration(gate, pack.info, material, check)
    info = _describe(pack, config, growth, hypernetwork, gate)
    info = replace(info, calibration=calibration, metrics=metrics)
    finish(config, processes, info, hypernetwork, gate)
    if "gate_calibration" in pack.info.metrics:
        log.warning(
            "The threshold of %s was chosen with `unhype calibrate`; it stays, but the new concepts were no part of it. "
            "Calibrate %s again.",
            pack.name,
            config.output.name,
        )
    return Extended(config.output, time.monotonic() - begin, changes, gate_difference, metrics)


def _train_further(
    config: TrainConfig,
    denoiser: DenoiserLike,
    setting: Setting,
    networks: tuple[Hypernetwork, Hypernetwork],
    texts: tuple[GateMaterial, Tensor, Gate],
    growth: Growth,
) -> Mapping[str, float]:
    """Train the second network on the new concepts while it keeps to the first on prompts of the old; what was measured.

    Args:
        texts: of the new concepts, embeddings of the old ones' prompts, and the gate of the new concepts.
    """
    (old, hypernetwork), (material, kept, gate) = networks, texts
    forget, retain = collect_pools(config, denoiser, setting, gate)
    check_trainable(denoiser, forget)
    kept = kept.to(denoiser.device)
    negatives = material.negatives.to(denoiser.device)
    objective = Extension(
        Direct(config.objective, hypernetwork, denoiser, Material(forget, retain, negatives)),
        old,
        kept,
        growth.keep_weight,
        unit=max(_mean_squared_norm(old, kept), 1e-12),
    )
    share = run_loop(config, setting, hypernetwork, objective)
    return measure_in_parts(config, objective, share)


def remove(path: Path, names: Sequence[str], output: Path) -> PackInfo:
    """Write a pack again without some of its concepts; what it does for the others stays.

    Raises:
        ConfigError: it has no such concept, or no other.
    """
    pack = checkpoint.load(path)
    info = pack.info
    unknown = [name for name in names if name not in info.concept_names]
    if unknown:
        raise ConfigError(
            f"{pack.name} has no concept {unknown[0]!r}. It erases: {', '.join(info.concept_names)}."
        )
    stay = [index for index, name in enumerate(info.concept_names) if name not in names]
    if not stay:
        raise ConfigError(
            f"{pack.name} erases nothing but {', '.join(info.concept_names)}. Leave one of them, or delete the pack."
        )
    _refuse_same(path, output)
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output is {output}, expected a file name ending in .safetensors.")
    check_writable(output)
    gate = _new_gate(pack.gate, num_concepts=len(stay), hidden_dim=pack.gate.config.hidden_dim)
    gate.load_state_dict(
        {
            name: value[stay] if name.startswith("layers.2.") else value
            for name, value in pack.gate.state_dict().items()
        }
    )
    removal = {
        "pack": pack.name,
        "concepts": [name for name in info.concept_names if name in names],
        "calibration": to_plain(info.calibration),
        "metrics": info.metrics,
    }
    written = replace(
        info,
        gate=gate.config,
        concepts=tuple(info.concepts[index] for index in stay),
        calibration=None,
        metrics={"removal": removal, **_discovered(info)},
        version=metadata.version("unhype"),
    )
    hypernetwork = pack.hypernetwork
    if isinstance(hypernetwork, EditsHypernetwork):
        hypernetwork = without_edits(hypernetwork, stay)
        written = replace(written, hypernetwork=hypernetwork.config)
    checkpoint.save(output, written, hypernetwork, gate)
    return written


def _discovered(info: PackInfo) -> dict[str, object]:
    """What discovery took in, which every later pack must still say: it is seen, not unseen."""
    found = info.metrics.get("discovered")
    return {"discovered": found} if found else {}


def fitting(pack: Pack, config: TrainConfig) -> TrainConfig:
    """The config without what the pack erases in its retain lists; says what it leaves out.

    Raises:
        ConfigError: the pack erases one of the concepts already, or the config asks for what an extension cannot do.
    """
    config = _of_its_kind(pack, config)
    names = set(pack.info.concept_names)
    erased = [phrase for concept in pack.info.concepts for phrase in concept.target]
    known = {form for phrase in erased for form in forms(phrase)}
    for concept in config.concepts:
        taken = [
            phrase
            for phrase in concept.target
            if normal(phrase) in known or any(normal(own) in forms(phrase) for own in erased)
        ]
        if concept.name in names or taken:
            what = f"phrase {taken[0]!r}" if taken else f"name {concept.name!r}"
            raise ConfigError(
                f"{pack.name} erases {concept.name!r} already: the {what} is one of its own. It erases: "
                f"{', '.join(pack.info.concept_names)}. Leave it out, or remove the old one first with `unhype remove`."
            )
    new = target_phrases(config.concepts)
    for concept in pack.info.concepts:
        if all(mentions(phrase, new) for phrase in concept.target):
            raise ConfigError(
                f"A new phrase stands in every phrase of {concept.name!r}, which {pack.name} erases: "
                f"{', '.join(concept.target)}. No prompt could tell the two apart. Train both anew, or give other phrases."
            )
    sizes = pack.info.hypernetwork
    edits = sizes.architecture is Architecture.EDITS
    wanted = ObjectiveName.CLOSED_FORM if edits else ObjectiveName.DIRECT
    if config.objective.name is not wanted:
        raise ConfigError(
            f"objective.name is {config.objective.name.value}, but {pack.name} is extended with {wanted.value}. "
            "Leave objective.name out."
        )
    own = NetworkConfig(
        architecture=sizes.architecture,
        rank=sizes.rank,
        hidden_dim=sizes.hidden_dim,
        num_steps=sizes.num_steps,
    )
    given = NetworkConfig.model_validate(EDITS_DEFAULTS) if edits else NetworkConfig()
    if config.network not in (own, given):
        name, wanted = next(
            (name, value) for name, value in config.network if value != getattr(own, name)
        )
        raise ConfigError(
            f"network.{name} is {wanted!r}, but an extension keeps the network of {pack.name}, where it is "
            f"{getattr(own, name)!r}. Leave the section out; --atoms says how many atoms are appended."
        )
    stays = set(pack.info.training.get("retain") or ())
    dropped = [
        phrase for phrase in config.retain if mentions(phrase, erased) and phrase not in stays
    ]
    if dropped:
        log.warning("Not retained, since %s erases it: %s.", pack.name, ", ".join(dropped))
    retain = tuple(phrase for phrase in config.retain if phrase not in dropped)
    if not retain:
        raise ConfigError(
            f"Nothing is left to retain: {pack.name} erases all of {', '.join(dropped)}. "
            "List phrases that must stay as they are."
        )
    captions = tuple(text for text in config.retain_captions if not mentions(text, erased))
    own_gate = pack.info.gate
    kept = ("tokens", "least_strength", "full_strength_at")
    gate = config.gate.model_copy(update={name: getattr(own_gate, name) for name in kept})
    if own_gate.least_strength == 1:
        gate = for_whole_lora(gate, len(config.concepts))
    own_parts = {"network": own, "gate": gate, "retain": retain, "retain_captions": captions}
    return config.model_copy(update=own_parts)


@torch.no_grad()
def grow(old: Hypernetwork, atoms: int, seed: int) -> Hypernetwork:
    """A trainable copy that writes the same, with further atoms a layer if it has atoms."""
    config = old.config
    if config.architecture is not Architecture.ATOMS or not atoms:
        return copy.deepcopy(old).train().requires_grad_(True)
    rank, layers = config.rank + atoms, len(old.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = make_hypernetwork(replace(config, rank=rank), old.targets)
    into = new.state_dict()  # shares memory with the parameters; new rows of up are zero
    for name, value in old.state_dict().items():
        if name.startswith("coefficients."):
            rows = into[name].unflatten(0, (layers, rank))
            rows[:, : config.rank] = value.unflatten(0, (layers, config.rank))
        else:
            into[name][tuple(slice(size) for size in value.shape)] = value
    return new


def difference(new: LoRAFactors, old: LoRAFactors) -> LoRAFactors:
    """dW_new - dW_old as factors of their ranks together: [up_new, -up_old] [down_new; down_old]."""
    plus, minus = (factors.scale.view(-1, 1, 1) for factors in (new, old))
    return LoRAFactors(
        new.targets,
        tuple(torch.cat(pair, dim=1) for pair in zip(new.down, old.down, strict=True)),
        tuple(
            torch.cat([plus * up, -minus * up_old], dim=2)
            for up, up_old in zip(new.up, old.up, strict=True)
        ),
        torch.ones_like(new.scale),
    )


@torch.no_grad()
def join_gates(old: Gate, new: Gate) -> Gate:
    """One gate with the outputs of both, each read from hidden units of its own.

    It standardizes as the old one does; what the new one did otherwise goes into its first layer. The new logits, whose
    threshold is probability 0.5, are shifted so that it is the old one's.
    """
    gate = _new_gate(
        old,
        num_concepts=old.config.num_concepts + new.config.num_concepts,
        hidden_dim=old.config.hidden_dim + new.config.hidden_dim,
    )
    gate.standardize.load_state_dict(old.standardize.state_dict())
    (first, last), (old_first, old_last), (new_first, new_last) = (
        first_and_last(one.layers) for one in (gate, old, new)
    )
    mean, std = new.standardize.mean, new.standardize.std
    offset = new_first.weight @ ((old.standardize.mean - mean) / std)
    first.weight.copy_(
        torch.cat([old_first.weight, new_first.weight * (old.standardize.std / std)])
    )
    first.bias.copy_(torch.cat([old_first.bias, new_first.bias + offset]))
    threshold = old.config.threshold
    shift = math.log(threshold) - math.log1p(-threshold)
    last.weight.copy_(torch.block_diag(old_last.weight, new_last.weight))
    last.bias.copy_(torch.cat([old_last.bias, new_last.bias + shift]))
    return gate.eval()


@dataclass(frozen=True)
class _Check:
    """Prompts of the old concepts that nothing was trained on, and which concept each asks for."""

    embeddings: Tensor
    concept: Tensor


def _new_gate(old: Gate, *, num_concepts: int, hidden_dim: int) -> Gate:
    with torch.random.fork_rng(devices=[]):
        return Gate(replace(old.config, num_concepts=num_concepts, hidden_dim=hidden_dim))


def _of_its_kind(pack: Pack, config: TrainConfig) -> TrainConfig:
    """The config in closed form if the pack holds edits and the config names no objective."""
    edits = pack.info.hypernetwork.architecture is Architecture.EDITS
    untold = config.objective == ObjectiveConfig() and config.network == NetworkConfig()
    return in_closed_form(config) if edits and untold else config


def _refuse_same(path: Path, output: Path) -> None:
    if path.resolve() == output.resolve():
        raise ConfigError(f"The output {output} is the pack itself. Give another --output.")


def _check_base(pack: Pack, denoiser: DenoiserLike) -> None:
    check_family(pack, denoiser)
    if pack.info.targets != denoiser.targets:
        raise ConfigError(
            f"{pack.name} changes {len(pack.info.targets)} layers, which are not the {len(denoiser.targets)} of "
            f"{denoiser.fingerprint.name}. Give {pack.info.base.name}, or a model like it."
        )


def _key(path: Path, config: TrainConfig, denoiser: DenoiserLike, growth: Growth) -> str:
    """Of the run: its settings, the model, and the pack that it starts from."""
    pack = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = f"{growth.atoms}/{growth.keep_weight}"
    return f"{config.digest()}/{denoiser.fingerprint.digest}/{pack}/{settings}"


def _kept_prompts(info: PackInfo, config: TrainConfig) -> list[str]:
    """Prompts of the old concepts as the pack's own training wrote them, without those that ask for a new one, too."""
    erased = [phrase for concept in info.concepts for phrase in concept.target]
    others = [*erased, *target_phrases(config.concepts)]
    stored = [
        phrase for phrase in info.training.get("retain") or () if not mentions(phrase, others)
    ]
    words = stored or [word for word in ordinary_words(erased) if not mentions(word, others)]
    data: dict[str, object] = {
        "checkpoint": info.base.name,
        "output": "none.safetensors",
        "concepts": to_plain(info.concepts),
        "retain": words,
    }
    if templates := info.training.get("templates"):
        data["templates"] = templates
    rng = random.Random(f"unhype extend {config.seed}")
    prompts = forget_prompts(make_config(data), KEPT_PROMPTS * len(info.concepts), rng=rng)
    return _without_new([prompt.text for prompt in prompts], config)


def _without_new(texts: Sequence[str], config: TrainConfig) -> list[str]:
    """Different texts that do not ask for a new concept, too: there the LoRA is to change."""
    new = target_phrases(config.concepts)
    return [text for text in dict.fromkeys(texts) if not mentions(text, new)]


def _check_material(info: PackInfo, config: TrainConfig, embed: Embed) -> _Check:
    texts, concept = target_prompts(info)
    concept_of = dict(zip(texts, concept, strict=True))
    left = _without_new(texts, config)
    return _Check(embed(left).cpu(), torch.tensor([concept_of[text] for text in left]))


def _with_others(material: GateMaterial, kept: Tensor, config: TrainConfig) -> GateMaterial:
    """The gate's material with the old concepts' prompts among those that the new outputs stay silent for."""
    num_held = round(len(kept) * config.gate.held_back)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(config.seed))
    held, trained = order[:num_held], order[num_held:]
    return replace(
        material,
        negatives=cat_prompts([material.negatives, kept[trained]]),
        held_negatives=cat_prompts([material.held_negatives, kept[held]]),
    )


@torch.no_grad()
def _mean_squared_norm(hypernetwork: Hypernetwork, embeddings: Tensor) -> float:
    parts = embeddings.split(prompts_at_once(hypernetwork))
    return torch.cat([hypernetwork.generate(part).squared_norm() for part in parts]).mean().item()


@torch.no_grad()
def _round_to_stored(hypernetwork: Hypernetwork) -> None:
    """Make the weights those that the file will hold, so that figures are of the file."""
    for parameter in hypernetwork.parameters():
        parameter.copy_(parameter.to(checkpoint.STORED))


@torch.no_grad()
def _changes(
    new: Hypernetwork, old: Hypernetwork, check: _Check, names: Sequence[str]
) -> dict[str, Change]:
    device = next(new.parameters()).device

    def relative(embeddings: Tensor, s: float) -> Tensor:
        parts = []
        for part in embeddings.to(device).split(prompts_at_once(new)):
            # The difference of near-equals: single precision sees some 1e-4.
            before, after = (h.generate(part, s).to("cpu", torch.float64) for h in (old, new))
            size = before.squared_norm().clamp(min=1e-24)
            parts.append((difference(after, before).squared_norm() / size).sqrt())
        return torch.cat(parts)

    changes = {}
    for index, name in enumerate(names):
        own = check.embeddings[check.concept == index]
        end = relative(own, float(new.config.num_steps))
        halfway = relative(own, new.config.num_steps / 2)
        changes[name] = Change(float(end.mean()), float(end.max()), float(halfway.mean()))
    return changes


@torch.no_grad()
def _gate_difference(gate: Gate, old: Gate, embeddings: Tensor) -> float:
    before = old.read(embeddings).probability
    after = gate.read(embeddings).probability[:, : before.shape[1]]
    return float((after - before).abs().max())


def _refuse_moved(
    changes: Mapping[str, Change], config: TrainConfig, growth: Growth, processes: PartialState
) -> None:
    name, change = max(changes.items(), key=lambda item: item[1].mean)
    if change.mean <= LIMIT:
        return
    if processes.is_main_process:
        state.state_path(config.output).unlink(missing_ok=True)
    advice = (
        f"Train longer (train.steps, now {config.train.steps}) or raise --keep-weight (now {growth.keep_weight:g}); "
        "--force writes it anyway. The trajectories are kept for it."
        if config.objective.name is ObjectiveName.DIRECT
        else "Prompts for it read too much like those for a new concept: give other phrases, or --force to write it anyway."
    )
    raise MovedError(
        f"The extension has changed the LoRA of {name!r} by {change.mean:.1%} on average ({change.worst:.1%} at worst), "
        f"more than {LIMIT:.0%}. No pack was written. {advice}"
    )


@torch.no_grad()
def _calibration(gate: Gate, old: PackInfo, material: GateMaterial, check: _Check) -> Calibration:
    """How the joined gate fares on ordinary prompts and on those of all its concepts."""
    concept = torch.cat([check.concept, material.held_concepts + len(old.concepts)])
    fired = gate.read(cat_prompts([check.embeddings, material.held_positives])).fired
    own = fired[torch.arange(len(concept)), concept]
    return Calibration(
        false_fire_rate=gate.read(material.held_negatives).open.float().mean().item(),
        miss_rate=1 - own.float().mean().item(),
        num_negatives=len(material.held_negatives),
        num_positives=len(concept),
    )


def _describe(
    pack: Pack,
    config: TrainConfig,
    growth: Growth,
    hypernetwork: Hypernetwork,
    gate: Gate,
) -> PackInfo:
    """What the pack says of itself, without what is measured."""
    old = pack.info
    # Templates and captions of all runs: `unhype calibrate` and further extensions must know what was trained on.
    shared = {
        name: list(dict.fromkeys([*getattr(config, name), *(old.training.get(name) or ())]))
        for name in ("retain_captions", "templates")
    }
    own = {key: value for key, value in old.training.items() if key not in shared}
    settings = {"atoms": growth.atoms, "keep_weight": growth.keep_weight}
    extends = {
        "pack": pack.name,
        "training": own,
        "training_digest": old.training_digest,
        **_discovered(old),
        **settings,
    }
    described = json.dumps([config.digest(), old.training_digest, settings])
    return replace(
        old,
        hypernetwork=hypernetwork.config,
        gate=gate.config,
        concepts=(
            *old.concepts,
            *(ConceptInfo(c.name, c.target, c.anchor) for c in config.concepts),
        ),
        training={**config.plain(), **shared, "extends": extends},
        training_digest=hashlib.sha256(described.encode()).hexdigest(),
        version=metadata.version("unhype"),
        license=config.license or old.license,
    )
