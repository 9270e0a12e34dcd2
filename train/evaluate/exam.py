"""Draw a task's questions without and with an eraser, judge them, and keep what every picture showed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from kornia.metrics import psnr, ssim
from torch import Tensor

from .base import Evaluator, Judgement, Kind, PictureModel, Question, Sampling
from .erasers import Eraser

PICTURES = 40
"""Of each kind of question, about; few questions are asked with several seeds."""
MOST_SEEDS = 8
SSIM_WINDOW = 11
ALONE = (Kind.TARGET, Kind.SYNONYM, Kind.LONG)
KEPT = (Kind.SIBLING, Kind.UNRELATED, Kind.PLAIN)
"""Kinds whose pictures should stay as they are."""

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Sheet:
    """Every picture to draw: its question and the seed of its noise."""

    questions: tuple[Question, ...]
    seeds: tuple[int, ...]

    @staticmethod
    def of(questions: Sequence[Question], first_seed: int, pictures: int = PICTURES) -> Sheet:
        """Each question as often as its kind needs for about ``pictures`` of the kind; seeds are consecutive."""
        counts = {kind: sum(q.kind is kind for q in questions) for kind in Kind}
        asked = [
            question
            for question in questions
            for _ in range(min(MOST_SEEDS, max(1, round(pictures / counts[question.kind]))))
        ]
        return Sheet(tuple(asked), tuple(range(first_seed, first_seed + len(asked))))

    def __len__(self) -> int:
        return len(self.questions)


@dataclass(frozen=True)
class Drawn:
    """The pictures of a sheet, (n, 3, height, width) of uint8, what was seen in them, and which an eraser touched, (n,)."""

    pictures: Tensor
    judgement: Judgement
    acts: Tensor


@dataclass(frozen=True)
class Answer:
    """What one picture showed.

    Attributes:
        hit: whether it shows what the prompt's word means; of SCENE, whether the erased concept is in it.
        base_hit: the same of the model's own picture.
        other, base_other: of SCENE, whether the other thing is in it.
        acts: whether the eraser did anything.
        identical: whether the picture equals the model's own to the last bit of its 8.
        ssim, psnr, distance: likeness to the model's own picture; PSNR in dB, distance between evaluator features relative
            to their length.
    """

    question: Question
    hit: bool
    base_hit: bool
    acts: bool
    identical: bool
    ssim: float
    psnr: float
    distance: float
    other: bool | None = None
    base_other: bool | None = None


@torch.no_grad()
def draw_sheet(
    sheet: Sheet,
    model: PictureModel,
    evaluator: Evaluator,
    eraser: Eraser,
    sampling: Sampling,
    *,
    base: Drawn | None = None,
    tick: Tick | None = None,
) -> Drawn:
    """Draw and judge every picture.

    Args:
        base: the model's own pictures; those that the eraser does not touch are taken from it, for they are the same.
    """
    texts = [question.text for question in sheet.questions]
    distinct = list(dict.fromkeys(texts))
    encoded = model.embed(distinct)
    place = {text: row for row, text in enumerate(distinct)}
    rows = torch.tensor([place[text] for text in texts])
    acts = torch.cat([eraser.write(part).acts for part in encoded.read.split(64)])[rows]
    todo = list(range(len(sheet))) if base is None else acts.nonzero().flatten().tolist()
    drawn: dict[int, Tensor] = {}
    for start in range(0, len(todo), sampling.batch_size):
        chosen = todo[start : start + sampling.batch_size]
        text = encoded.rows(rows[chosen])
        latents = model.sample(
            text,
            eraser.write(text.read).factors,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            noise=model.noise([sheet.seeds[index] for index in chosen], sampling.size),
        )
        pictures = (model.decode(latents).cpu() * 255).round().to(torch.uint8)
        drawn.update(zip(chosen, pictures, strict=True))
        if tick is not None:
            tick(start + len(chosen), len(todo))
    everything = torch.stack(
        [
            drawn[index] if base is None or index in drawn else base.pictures[index]
            for index in range(len(sheet))
        ]
    )
    parts = [evaluator.judge(part.float() / 255) for part in everything.split(64)]
    return Drawn(everything, Judgement.cat(parts), acts)


def mark(sheet: Sheet, evaluator: Evaluator, base: Drawn, drawn: Drawn) -> list[Answer]:
    """Compare every picture with what was asked, and with the model's own."""
    labels = {label: index for index, label in enumerate(evaluator.labels)}
    ours, theirs = drawn.pictures.float() / 255, base.pictures.float() / 255
    likeness = ssim(ours, theirs, SSIM_WINDOW).mean((1, 2, 3)).tolist()
    features = base.judgement.features
    distance = (drawn.judgement.features - features).norm(dim=1) / features.norm(dim=1)
    answers = []
    for index, question in enumerate(sheet.questions):
        shown = [labels[name] for name in question.shows]

        def sees(
            judged: Judgement, number: int, row: int = index, wanted: list[int] = shown
        ) -> bool:
            return bool(judged.scores[row, wanted[number]] > evaluator.present)

        def hits(judged: Judgement, row: int = index, wanted: list[int] = shown) -> bool:
            return bool(wanted) and int(judged.top[row]) == wanted[0]

        scene = question.kind is Kind.SCENE
        same = torch.equal(drawn.pictures[index], base.pictures[index])
        answers.append(
            Answer(
                question,
                hit=sees(drawn.judgement, 0) if scene else hits(drawn.judgement),
                base_hit=sees(base.judgement, 0) if scene else hits(base.judgement),
                acts=bool(drawn.acts[index]),
                identical=same,
                ssim=likeness[index],
                psnr=100.0 if same else float(psnr(ours[index], theirs[index], 1.0)),
                distance=float(distance[index]),
                other=sees(drawn.judgement, 1) if scene else None,
                base_other=sees(base.judgement, 1) if scene else None,
            )
        )
    return answers
