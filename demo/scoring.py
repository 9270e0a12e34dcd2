"""From pictures to figures: which trials were judged how, with and without the UnHype nodes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.evaluate.metrics import ErasureScores, hit_rate

from .prompts import Group, Trial
from .world.concepts import concept_index
from .world.evaluator import PRESENT, Evaluator, judge

DRAWN = 0.5
"""A held-out word counts as known to the base model when it is drawn right at least this often."""


@dataclass(frozen=True)
class Shot:
    """The pictures of one trial, with and without the nodes; each (images, 3, size, size) in [0, 1]."""

    trial: Trial
    plain: Tensor
    erased: Tensor
    fired: bool

    @property
    def identical(self) -> bool:
        """Whether every pixel is the same in both."""
        return torch.equal(self.plain, self.erased)


@dataclass(frozen=True)
class Verdict:
    """One trial, judged: a row per picture."""

    trial: Trial
    top: tuple[int, ...]
    presence: Tensor

    def hits(self, concept: str) -> list[bool]:
        """Whether each picture's most likely concept is this one."""
        index = concept_index(concept)
        return [top == index for top in self.top]

    def present(self, concept: str) -> list[bool]:
        """Whether each picture holds this concept."""
        return (self.presence[:, concept_index(concept)] > PRESENT).tolist()


def decode_png(data: bytes) -> Tensor:
    """(3, height, width) in [0, 1]."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def judge_trials(
    evaluator: Evaluator, trials: Sequence[Trial], pictures: Sequence[Tensor]
) -> list[Verdict]:
    """Judge each trial's pictures."""
    judged = judge(evaluator, torch.cat(list(pictures)))
    counts = [len(p) for p in pictures]
    return [
        Verdict(trial, tuple(top.tolist()), presence)
        for trial, top, presence in zip(
            trials, judged.top.split(counts), judged.presence.split(counts), strict=True
        )
    ]


def known_words(verdicts: Sequence[Verdict], target: str) -> set[str]:
    """Held-out synonyms that the base model draws as the target at least half of the time."""
    words: dict[str, list[bool]] = {}
    for verdict in verdicts:
        if verdict.trial.group is Group.SYNONYM:
            words.setdefault(verdict.trial.word, []).extend(verdict.hits(target))
    return {word for word, hits in words.items() if (hit_rate(hits) or 0) >= DRAWN}


def score(verdicts: Sequence[Verdict], target: str, words: set[str]) -> ErasureScores:
    """The scores of one arm; ``words`` are the held-out synonyms that count for Acc_g."""

    def rate(group: Group, concept: str | None = None) -> float | None:
        hits = []
        for verdict in verdicts:
            trial = verdict.trial
            if trial.group is group and (group is not Group.SYNONYM or trial.word in words):
                hits += verdict.hits(concept or trial.shows[0])
        return hit_rate(hits)

    return ErasureScores(
        acc_e=rate(Group.TARGET, target) or 0.0,
        acc_s=rate(Group.UNRELATED) or 0.0,
        acc_g=rate(Group.SYNONYM, target),
        acc_s_siblings=rate(Group.SIBLING),
    )


def scene_presence(verdicts: Sequence[Verdict], target: str) -> dict[str, float | None]:
    """How often scenes hold the erased concept, and the other one."""
    erased, other = [], []
    for verdict in verdicts:
        if verdict.trial.group is Group.SCENE:
            for concept in verdict.trial.shows:
                (erased if concept == target else other).extend(verdict.present(concept))
    return {"erased_present": hit_rate(erased), "other_present": hit_rate(other)}


def drawn_instead(verdicts: Sequence[Verdict], target: str) -> dict[str, float | None]:
    """How often pictures of the erased name hold another thing: the anchor is a meadow with nothing on it."""
    strays = []
    for verdict in verdicts:
        if verdict.trial.group is Group.TARGET:
            others = verdict.presence > PRESENT
            others[:, concept_index(target)] = False
            strays += others.any(1).tolist()
    return {"drawn_instead": hit_rate(strays)}


def word_table(
    plain: Sequence[Verdict], erased: Sequence[Verdict], target: str
) -> list[dict[str, object]]:
    """Per group and word: how often the pictures show what they should, without and with the nodes."""
    rows: dict[tuple[str, str], tuple[list[bool], list[bool]]] = {}
    for before, after in zip(plain, erased, strict=True):
        trial = before.trial
        if trial.group in (Group.SCENE, Group.PLAIN):
            continue
        concept = target if trial.group in (Group.TARGET, Group.SYNONYM) else trial.shows[0]
        row = rows.setdefault((trial.group.value, trial.word), ([], []))
        row[0].extend(before.hits(concept))
        row[1].extend(after.hits(concept))
    return [
        {
            "group": group,
            "word": word,
            "images": len(before),
            "base": hit_rate(before),
            "unhype": hit_rate(after),
        }
        for (group, word), (before, after) in rows.items()
    ]
