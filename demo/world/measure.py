"""Measure the demo world through ComfyUI's server: ``python -m demo.world.measure``.

Names, held-out synonyms, held-out templates and two-object scenes, judged by the evaluator; the figures go to
``demo/world/measured.json`` and the table of ``demo/README.md`` is made from it.
"""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from unhype.host.locate import REPOSITORY

from .. import host
from ..scoring import decode_png
from ..server import ComfyServer
from ..workflow import Sampling, fill, load_workflow, without_unhype
from .art import COLORS
from .concepts import STYLES, concept_index, load_concepts, load_held_out
from .evaluator import PRESENT, judge, load_evaluator
from .expand import CHECKPOINT_NAME, COMPACT, EVALUATOR, expand
from .words import known_words, tokenizer_folder

FIRST_SEED = 500_000
SCENES = ("a {} next to a {}", "a {} and a {}", "a photo of a {} beside a {}")


@dataclass(frozen=True)
class Question:
    """One prompt and the concepts its pictures must show."""

    kind: str
    text: str
    shows: tuple[str, ...]
    style: int = -1


def make_questions(*, templates: int, scenes: int, styles: int) -> list[Question]:
    """Every prompt of the measurement; the draws are fixed."""
    rng = random.Random("unhype world questions")
    concepts = [concept.name for concept in load_concepts()]
    held_out = load_held_out()
    vocabulary = known_words(tokenizer_folder())
    questions = [Question("names", f"a photo of a {name}", (name,)) for name in concepts]
    for name, words in held_out.synonyms.items():
        for word in words:
            kind = (
                "held-out synonyms"
                if word in vocabulary
                else "held-out synonyms outside the vocabulary"
            )
            questions.append(Question(kind, f"a photo of a {word}", (name,)))
    for template in held_out.templates:
        for name in rng.sample(concepts, templates):
            questions.append(
                Question(f"unseen template “{template}”", template.format(name), (name,))
            )
    for index in range(scenes):
        first, second = rng.sample(concepts, 2)
        questions.append(
            Question("scenes", SCENES[index % len(SCENES)].format(first, second), (first, second))
        )
    for index, style in enumerate(STYLES):
        for name in rng.sample(concepts, styles):
            questions.append(Question("styles", f"a {name} in {style.word} style", (name,), index))
    for name in rng.sample(concepts, styles * 2):
        questions.append(
            Question("backgrounds", f"a {name} on a {rng.choice(list(COLORS))} background", (name,))
        )
    return questions


def measure(
    questions: Sequence[Question], server: ComfyServer, sampling: Sampling
) -> dict[str, dict[str, float]]:
    """Draw every question and judge it: share of right pictures by kind."""
    evaluator, template = load_evaluator(EVALUATOR), load_workflow()
    hits: dict[str, list[bool]] = {}
    for index, question in enumerate(track(questions, description="drawing")):
        workflow = fill(
            template,
            text=question.text,
            seed=FIRST_SEED + index,
            pack="",
            checkpoint=CHECKPOINT_NAME,
            sampling=sampling,
        )
        outputs = server.run(without_unhype(workflow))
        pictures = torch.stack([decode_png(data) for data in server.images(outputs)])
        judged = judge(evaluator, pictures)
        shown = [concept_index(name) for name in question.shows]
        if question.style >= 0:
            found = (judged.style == question.style).tolist()
        elif len(shown) == 1:
            found = (judged.top == shown[0]).tolist()
        else:
            found = (judged.presence[:, shown] > PRESENT).flatten().tolist()
        hits.setdefault(question.kind, []).extend(found)
    templates = [
        hit for kind, values in hits.items() if kind.startswith("unseen template") for hit in values
    ]
    hits["unseen templates, all"] = templates
    return {
        kind: {"share": sum(values) / len(values), "judged": len(values)}
        for kind, values in hits.items()
    }


def main(
    templates: Annotated[int, typer.Option(help="Concepts for each unseen template.")] = 40,
    scenes: Annotated[int, typer.Option(help="Two-object prompts.")] = 60,
    styles: Annotated[int, typer.Option(help="Concepts for each style.")] = 15,
    seeds: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(__file__).parent
    / "measured.json",
) -> None:
    """Draw every kind of prompt through ComfyUI and judge the pictures."""
    console = Console()
    comfyui = host.prepare()
    base = host.make_base(REPOSITORY / "demo" / "out" / "base")
    expand(COMPACT, base / "models" / "checkpoints" / CHECKPOINT_NAME)
    sampling = Sampling(images_per_prompt=seeds)
    questions = make_questions(templates=templates, scenes=scenes, styles=styles)
    with ComfyServer(comfyui, base, threads=os.cpu_count()) as server:
        figures = measure(questions, server, sampling)
    result = {
        "figures": figures,
        "seeds": seeds,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    for kind, row in figures.items():
        console.print(f"{kind:48} {row['share']:.3f} of {row['judged']}")


if __name__ == "__main__":
    typer.run(main)
