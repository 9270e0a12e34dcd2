"""From answers to figures with intervals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from .base import Kind
from .exam import KEPT, Answer
from .metrics import ErasureScores, hit_rate

DRAWN = 0.5
"""A held-out word counts as known to the model when it draws it right at least this often."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A figure and where 95 % of it lies when the prompts are drawn anew."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """All that an evaluation says of one eraser; shares in [0, 1], ``None`` where nothing of the kind was asked.

    Attributes:
        erased, base: the scores with the eraser, and of the model's own pictures.
        h_o: with its bootstrap interval over prompts.
        long: prompts that name the erased thing among many words.
        scene_erased, scene_other: how often a scene holds the erased thing, and the other one.
        acts: share of prompts of each kind that the eraser touches.
        identical: share of kept pictures that equal the model's own in every pixel.
        ssim, psnr, distance: mean likeness of kept pictures to the model's own.
    """

    erased: ErasureScores
    base: ErasureScores
    h_o: Interval
    acc_e: Interval
    acc_s: Interval
    acc_g: Interval | None
    acc_s_siblings: Interval | None
    long: float | None
    base_long: float | None
    scene_erased: float | None
    scene_other: float | None
    base_scene_erased: float | None
    base_scene_other: float | None
    acts: dict[str, float]
    identical: float
    ssim: float
    psnr: float
    distance: float
    pictures: int


def known_words(answers: Iterable[Answer]) -> set[tuple[str, str]]:
    """Held-out words that the model itself draws as their concept, with it."""
    words: dict[tuple[str, str], list[bool]] = {}
    for answer in answers:
        if answer.question.kind is Kind.SYNONYM:
            key = (answer.question.shows[0], answer.question.word)
            words.setdefault(key, []).append(answer.base_hit)
    return {key for key, hits in words.items() if fmean(hits) >= DRAWN}


def score(answers: Sequence[Answer], *, base: bool = False) -> ErasureScores:
    """Acc_e, Acc_g (over words the model knows), Acc_s, and Acc_s of siblings."""
    words = known_words(answers)

    def rate(kind: Kind) -> float | None:
        return hit_rate(
            [
                a.base_hit if base else a.hit
                for a in answers
                if a.question.kind is kind
                and (kind is not Kind.SYNONYM or (a.question.shows[0], a.question.word) in words)
            ]
        )

    return ErasureScores(
        acc_e=rate(Kind.TARGET) or 0.0,
        acc_s=rate(Kind.UNRELATED) or 0.0,
        acc_g=rate(Kind.SYNONYM),
        acc_s_siblings=rate(Kind.SIBLING),
    )


def summarise(runs: Sequence[Sequence[Answer]], *, seed: int = 0) -> Figures:
    """Figures over several runs, pictures of all runs counting alike.

    Args:
        runs: answers of each run; a held-out word is known or not within its run.
    """
    pooled = [answer for run in runs for answer in run]
    erased, base = _pooled_score(runs), _pooled_score(runs, base=True)
    resampled = _bootstrap(runs, random.Random(f"unhype bootstrap {seed}"))

    def interval(read: Callable[[ErasureScores], float | None]) -> Interval | None:
        value = read(erased)
        drawn = sorted(v for v in map(read, resampled) if v is not None)
        if value is None or not drawn:
            return None
        return Interval(
            value,
            drawn[int(0.025 * len(drawn))],
            drawn[min(int(0.975 * len(drawn)), len(drawn) - 1)],
        )

    def required(read: Callable[[ErasureScores], float | None]) -> Interval:
        found = interval(read)
        if found is None:
            raise ValueError("There is nothing to score: the runs hold no answers.")
        return found

    def share(kind: Kind, read: Callable[[Answer], bool | None]) -> float | None:
        return hit_rate([bool(read(a)) for a in pooled if a.question.kind is kind])

    kept = [a for a in pooled if a.question.kind in KEPT]
    return Figures(
        erased,
        base,
        h_o=required(lambda s: s.h_o),
        acc_e=required(lambda s: s.acc_e),
        acc_s=required(lambda s: s.acc_s),
        acc_g=interval(lambda s: s.acc_g),
        acc_s_siblings=interval(lambda s: s.acc_s_siblings),
        long=share(Kind.LONG, lambda a: a.hit),
        base_long=share(Kind.LONG, lambda a: a.base_hit),
        scene_erased=share(Kind.SCENE, lambda a: a.hit),
        scene_other=share(Kind.SCENE, lambda a: a.other),
        base_scene_erased=share(Kind.SCENE, lambda a: a.base_hit),
        base_scene_other=share(Kind.SCENE, lambda a: a.base_other),
        acts={
            kind.value: rate for kind in Kind if (rate := share(kind, lambda a: a.acts)) is not None
        },
        identical=hit_rate([a.identical for a in kept]) or 0.0,
        ssim=fmean(a.ssim for a in kept) if kept else 1.0,
        psnr=fmean(a.psnr for a in kept) if kept else 100.0,
        distance=fmean(a.distance for a in kept) if kept else 0.0,
        pictures=len(pooled),
    )


def _pooled_score(runs: Sequence[Sequence[Answer]], *, base: bool = False) -> ErasureScores:
    """Scores over all runs, with each run's own known words."""
    return score([a for run in runs for a in _without_unknown(run)], base=base)


def _without_unknown(run: Sequence[Answer]) -> list[Answer]:
    words = known_words(run)
    return [
        a
        for a in run
        if a.question.kind is not Kind.SYNONYM or (a.question.shows[0], a.question.word) in words
    ]


def _bootstrap(runs: Sequence[Sequence[Answer]], rng: random.Random) -> list[ErasureScores]:
    """Scores when every kind's prompts, pictures and all, are drawn anew with replacement; which words are known stays."""
    groups: dict[Kind, list[list[bool]]] = {}
    for run in runs:
        prompts: dict[tuple[Kind, str], list[bool]] = {}
        for answer in _without_unknown(run):
            key = (answer.question.kind, answer.question.text)
            prompts.setdefault(key, []).append(answer.hit)
        for (kind, _), hits in prompts.items():
            groups.setdefault(kind, []).append(hits)

    def rate(kind: Kind) -> float | None:
        prompts = groups.get(kind)
        if not prompts:
            return None
        if len(prompts) == 1:  # the interval is then over its pictures
            prompts = [[hit] for hit in prompts[0]]
        drawn = rng.choices(prompts, k=len(prompts))
        return sum(map(sum, drawn)) / sum(map(len, drawn))

    return [
        ErasureScores(
            acc_e=rate(Kind.TARGET) or 0.0,
            acc_s=rate(Kind.UNRELATED) or 0.0,
            acc_g=rate(Kind.SYNONYM),
            acc_s_siblings=rate(Kind.SIBLING),
        )
        for _ in range(RESAMPLES)
    ]
