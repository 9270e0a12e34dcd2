"""From answers to figures with intervals."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .base import Kind, Question
from .exam import KEPT, Answer
from .metrics import ErasureScores, hit_rate

DRAWN = 0.5
"""A held-out word counts as known to the model when it draws it right at least this often."""
RESAMPLES = 1000
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Interval:
    """A figure and where 95 % of it lies when the prompts are drawn anew."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(value: float, drawn: Iterable[float]) -> Interval:
        """Where the middle 95 % of the same figure, drawn anew many times, lie."""
        ordered = sorted(drawn)
        return Interval(
            value, ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))]
        )


def interval(answers: Iterable[Answer], read: Callable[[Answer], float | None]) -> Interval | None:
    """The mean of something, with a 95 % bootstrap interval over prompts; of a single prompt over its pictures."""
    return _interval(_by_prompt(answers, read))


def rate(answers: Iterable[Answer], read: Callable[[Answer], bool | None]) -> Interval | None:
    """``interval`` of a share; of 0 or 1, where drawing anew changes nothing, Wilson's with prompts for trials."""
    return _rate(_by_prompt(answers, read))


def wilson(successes: int, total: int) -> Interval | None:
    """A share with its 95 % Wilson score interval, which is no point even at 0 or 1; none of nothing."""
    if not total:
        return None
    share, z = successes / total, NORMAL_95
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = (
        z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    )
    return Interval(
        share, min(share, max(0.0, middle - spread)), max(share, min(1.0, middle + spread))
    )


Groups = Sequence[Sequence[float]]
"""What the pictures of each prompt gave."""


def _by_prompt(
    answers: Iterable[Answer], read: Callable[[Answer], float | None]
) -> list[list[float]]:
    prompts: dict[Question, list[float]] = {}
    for answer in answers:
        value = read(answer)
        if value is not None:
            prompts.setdefault(answer.question, []).append(float(value))
    return list(prompts.values())


def _interval(prompts: Groups) -> Interval | None:
    if not prompts:
        return None
    rng = random.Random("unhype interval")
    return Interval.of(_mean(prompts), [_mean_anew(prompts, rng) for _ in range(RESAMPLES)])


def _rate(prompts: Groups) -> Interval | None:
    found = _interval(prompts)
    if found is None or 0 < found.value < 1:
        return found
    return wilson(round(found.value) * len(prompts), len(prompts))


def _mean(prompts: Groups) -> float:
    return sum(map(sum, prompts)) / sum(map(len, prompts))


def _mean_anew(prompts: Groups, rng: random.Random) -> float:
    """The mean over as many prompts drawn with replacement; of a single prompt, its pictures are drawn."""
    if len(prompts) == 1:
        prompts = [[value] for value in prompts[0]]
    return _mean(rng.choices(prompts, k=len(prompts)))


@dataclass(frozen=True)
class Figures:
    """All that an evaluation says of one eraser; shares in [0, 1], ``None`` where nothing of the kind was asked.

    Attributes:
        erased, base: the scores with the eraser, and of the model's own pictures.
        h_o, acc_e, acc_s, acc_g, acc_s_siblings: with the eraser, with their intervals.
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


def of_known_words(answers: Sequence[Answer]) -> list[Answer]:
    """All answers but those to held-out words that the model itself does not draw."""
    words = known_words(answers)
    return [
        a
        for a in answers
        if a.question.kind is not Kind.SYNONYM or (a.question.shows[0], a.question.word) in words
    ]


def score(answers: Sequence[Answer], *, base: bool = False) -> ErasureScores:
    """Acc_e, Acc_g (over words the model knows), Acc_s, and Acc_s of siblings."""
    known = of_known_words(answers)
    return _scores(
        lambda kind: hit_rate(
            [a.base_hit if base else a.hit for a in known if a.question.kind is kind]
        )
    )


def _scores(rate: Callable[[Kind], float | None]) -> ErasureScores:
    return ErasureScores(
        acc_e=rate(Kind.TARGET) or 0.0,
        acc_s=rate(Kind.UNRELATED) or 0.0,
        acc_g=rate(Kind.SYNONYM),
        acc_s_siblings=rate(Kind.SIBLING),
    )


def summarise(runs: Sequence[Sequence[Answer]]) -> Figures:
    """Figures over several runs, pictures of all runs counting alike.

    Args:
        runs: answers of each run; a held-out word is known or not within its run.
    """
    pooled = [answer for run in runs for answer in run]
    known = [answer for run in runs for answer in of_known_words(run)]
    prompts = _prompts(runs)
    nothing = Interval(0.0, 0.0, 0.0)

    def share(kind: Kind, read: Callable[[Answer], bool | None]) -> float | None:
        return hit_rate([bool(read(a)) for a in pooled if a.question.kind is kind])

    kept = [a for a in pooled if a.question.kind in KEPT]
    return Figures(
        score(known),
        score(known, base=True),
        h_o=_h_o(prompts),
        acc_e=_rate(prompts[Kind.TARGET]) or nothing,
        acc_s=_rate(prompts[Kind.UNRELATED]) or nothing,
        acc_g=_rate(prompts[Kind.SYNONYM]),
        acc_s_siblings=_rate(prompts[Kind.SIBLING]),
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


def h_o(answers: Sequence[Answer]) -> Interval:
    """H_o of one run."""
    return _h_o(_prompts([answers]))


def _h_o(prompts: Mapping[Kind, Groups]) -> Interval:
    """Every kind's prompts, pictures and all, are drawn anew; which words are known stays."""
    rng = random.Random("unhype bootstrap 0")

    def scores(mean: Callable[[Groups], float]) -> ErasureScores:
        return _scores(lambda kind: mean(prompts[kind]) if prompts[kind] else None)

    drawn = [scores(lambda groups: _mean_anew(groups, rng)).h_o for _ in range(RESAMPLES)]
    return Interval.of(scores(_mean).h_o, drawn)


def _prompts(runs: Sequence[Sequence[Answer]]) -> dict[Kind, Groups]:
    """The hits of each prompt of each kind; the same prompt in another run is another."""
    known = [of_known_words(run) for run in runs]
    return {
        kind: [
            hits
            for run in known
            for hits in _by_prompt([a for a in run if a.question.kind is kind], lambda a: a.hit)
        ]
        for kind in Kind
    }
