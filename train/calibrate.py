"""Choose a pack's threshold anew: how many ordinary captions may fire, and what is missed at that price."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unhype import checkpoint
from unhype.checkpoint import Calibration, Pack, PackInfo, to_plain
from unhype.embedding import cat_prompts

from .config import DATA, ConfigError, make_config, read_lines
from .gate import Embed, logits_of
from .prompts import forget_prompts, mentions
from .shorthand import ordinary_words

POSITIVES = 200
"""Prompts that ask for each concept."""
MOST_MISSED = 0.5
"""A gate that misses this share of a concept's prompts is of no use."""
CURVE_POINTS = 50
SHOWN = 5
SMALLEST, DIGITS = 1e-6, 6
"""Thresholds on the curve, and how finely they are kept."""


class CalibrationError(ValueError):
    """No threshold does what was asked."""


@dataclass(frozen=True)
class Captions:
    """Captions that ask for nothing erased, and how many of the file were left out.

    Attributes:
        num_mentioning: left out because an erased phrase stands in them.
        num_trained: left out because training was told to retain them.
    """

    texts: tuple[str, ...]
    num_mentioning: int
    num_trained: int


@dataclass(frozen=True)
class Curve:
    """What would go wrong at each threshold, from low to high."""

    threshold: tuple[float, ...]
    false_fire_rate: tuple[float, ...]
    miss_rate: tuple[float, ...]


@dataclass(frozen=True)
class Recalibration:
    """A threshold for a budget.

    Attributes:
        before: rates at the pack's old threshold, on the same prompts.
        missed: miss rate of every concept by name.
        loudest: the captions that come nearest to firing, or fire, with their probability.
    """

    budget: float
    old_threshold: float
    threshold: float
    before: Calibration
    calibration: Calibration
    missed: dict[str, float]
    loudest: dict[str, float]
    curve: Curve


@dataclass(frozen=True)
class Scores:
    """What the gate gives captions at most, (captions,), and prompts for their own concept, (prompts,)."""

    silent: Tensor
    fire: Tensor
    concept: Tensor

    def false_fires(self, threshold: float) -> float:
        return (self.silent >= threshold).float().mean().item()

    def missed(self, threshold: float) -> list[float]:
        """The share of every concept's prompts that do not fire."""
        missed = (self.fire < threshold).float()
        return [missed[self.concept == c].mean().item() for c in range(int(self.concept.max()) + 1)]

    def at(self, threshold: float) -> Calibration:
        return Calibration(
            false_fire_rate=self.false_fires(threshold),
            miss_rate=(self.fire < threshold).float().mean().item(),
            num_negatives=len(self.silent),
            num_positives=len(self.fire),
        )


def read_captions(path: Path, info: PackInfo) -> Captions:
    """The captions of a file that the pack's gate must stay silent for.

    Raises:
        ConfigError: there is no such file, or nothing is left of it.
    """
    try:
        lines = tuple(dict.fromkeys(read_lines(path)))
    except ValueError as error:
        raise ConfigError(f"--captions: {error}.") from error
    targets = [phrase for concept in info.concepts for phrase in concept.target]
    ordinary = [line for line in lines if not mentions(line, targets)]
    trained = frozenset(info.training.get("retain_captions") or ())
    unseen = tuple(line for line in ordinary if line not in trained)
    if not unseen:
        raise ConfigError(
            f"{path} has no caption to calibrate on: of {len(lines)} lines {len(lines) - len(ordinary)} mention an erased "
            f"phrase and {len(ordinary)} were retained in training. Give ordinary captions, one a line."
        )
    return Captions(unseen, len(lines) - len(ordinary), len(ordinary) - len(unseen))


def target_prompts(info: PackInfo) -> tuple[list[str], list[int]]:
    """Prompts that ask for the pack's concepts, in words that no training uses, and which concept each asks for."""
    used = info.training.get("templates") or ()
    targets = [phrase for concept in info.concepts for phrase in concept.target]
    config = make_config(
        {
            "checkpoint": info.base.name,
            "output": "none.safetensors",
            "concepts": to_plain(info.concepts),
            "retain": ordinary_words(targets),
            "templates": [t for t in read_lines(DATA / "held_out_templates.txt") if t not in used],
        }
    )
    rng = random.Random("unhype calibrate")
    prompts = forget_prompts(config, POSITIVES * len(info.concepts), rng=rng)
    return [prompt.text for prompt in prompts], [prompt.concept for prompt in prompts]


def recalibrate(pack: Pack, embed: Embed, captions: Sequence[str], budget: float) -> Recalibration:
    """Find the threshold at which the gate misses least while at most ``budget`` of the captions fire.

    Where a stretch of thresholds does equally well, its middle in log-odds is taken.

    Raises:
        CalibrationError: at every such threshold some concept is missed half of the time.
    """
    prompts, concept = target_prompts(pack.info)
    scores = _scores(pack, embed, captions, (prompts, concept))
    names = pack.info.concept_names
    shown = _loudest(captions, scores.silent)
    threshold = choose(scores, budget)
    missed = scores.missed(threshold) if threshold is not None else [1.0] * len(names)
    worst, name = max(zip(missed, names, strict=True))
    if threshold is None or worst >= MOST_MISSED:
        smallest = scores.false_fires(_half_missed(scores))
        raise CalibrationError(
            f"No threshold of {pack.name} meets the budget: with at most {budget:.2%} of {len(captions)} captions firing, "
            f"{worst:.0%} of the prompts that ask for {name!r} are missed. To miss fewer than half, allow "
            f"--budget {math.ceil(smallest * 1e4) / 1e4:g}, or train again with more captions of this kind in "
            f"retain_captions. Captions that ask for it in other words must go; the loudest: {'; '.join(shown)}. "
            "The pack was not changed."
        )
    return Recalibration(
        budget,
        pack.info.gate.threshold,
        threshold,
        scores.at(pack.info.gate.threshold),
        scores.at(threshold),
        dict(zip(names, missed, strict=True)),
        shown,
        _curve(scores, threshold),
    )


def write(path: Path, pack: Pack, result: Recalibration, captions: Captions, source: str) -> None:
    """Write the pack again with its new threshold; the weights stay as they are.

    Args:
        source: name of the captions' file.
    """
    record = {
        "budget": result.budget,
        "captions": source,
        "mentioning_a_target": captions.num_mentioning,
        "retained_in_training": captions.num_trained,
        "miss_rates": result.missed,
    }
    info = replace(
        pack.info,
        gate=replace(pack.info.gate, threshold=result.threshold),
        calibration=result.calibration,
        metrics={
            **pack.info.metrics,
            "gate_calibration": record,
            "gate_roc": to_plain(result.curve),
        },
    )
    # Where the name is a link, the file it leads to is the one to replace.
    checkpoint.save(path.resolve(), info, pack.hypernetwork, pack.gate)


def in_batches(embed: Embed, size: int, tick: Callable[[int, int], None]) -> Embed:
    """The same with progress; what is of all tokens in half precision, for there are many."""

    def run(texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), size):
            part = embed(texts[start : start + size]).cpu()
            parts.append(part.half() if part.dim() == 3 else part.float())
            tick(min(start + size, len(texts)), len(texts))
        return cat_prompts(parts)

    return run


@torch.no_grad()
def _scores(
    pack: Pack, embed: Embed, captions: Sequence[str], prompts: tuple[list[str], list[int]]
) -> Scores:
    texts, concept = prompts
    embedded = embed([*captions, *texts])
    probability = logits_of(pack.gate, embedded).sigmoid()
    asked = torch.tensor(concept)
    own = probability[len(captions) :][torch.arange(len(texts)), asked]
    return Scores(probability[: len(captions)].amax(1), own, asked)


def choose(scores: Scores, budget: float) -> float | None:
    """The threshold of :func:`recalibrate`; none if at none of them a prompt that should fire can."""
    allowed = math.floor(budget * len(scores.silent) + 1e-9)
    ordered = scores.silent.sort(descending=True).values
    low = ordered[allowed] if allowed < len(ordered) else torch.tensor(SMALLEST)
    above = scores.fire[scores.fire > low]
    if not len(above) or low >= 1:
        return None
    high = above.min()
    middle = torch.logit(torch.stack([low, high]), eps=1e-7).mean().sigmoid()
    # Neighbouring numbers have no middle; a probability of 1 is no threshold.
    chosen = middle if low < middle <= high else high
    return min(float(chosen), 1 - 2**-24)


def _loudest(captions: Sequence[str], probability: Tensor) -> dict[str, float]:
    top = probability.topk(min(SHOWN, len(captions)))
    return {
        captions[int(index)]: round(float(value), DIGITS)
        for value, index in zip(top.values, top.indices, strict=True)
    }


def _half_missed(scores: Scores) -> float:
    """The highest threshold at which fewer than half of every concept's prompts are missed."""
    middles = []
    for concept in range(int(scores.concept.max()) + 1):
        own = scores.fire[scores.concept == concept].sort().values
        middles.append(float(own[math.ceil(len(own) / 2) - 1]))
    return min(middles)


def _curve(scores: Scores, chosen: float) -> Curve:
    """Rates at thresholds that spread evenly over both of them, and at the chosen one."""
    half = CURVE_POINTS // 2
    shares = torch.logspace(-math.log10(len(scores.silent)), 0, half)
    spread = torch.cat(
        [
            torch.quantile(scores.silent, 1 - shares),
            torch.quantile(scores.fire, torch.linspace(0, 1, CURVE_POINTS - half - 1)),
        ]
    )
    rounded = {round(x, DIGITS) for x in spread.clamp(SMALLEST, 1 - SMALLEST).tolist()}
    thresholds = sorted(rounded | {chosen})
    rates = [scores.at(threshold) for threshold in thresholds]
    return Curve(
        tuple(thresholds),
        tuple(round(rate.false_fire_rate, DIGITS) for rate in rates),
        tuple(round(rate.miss_rate, DIGITS) for rate in rates),
    )
