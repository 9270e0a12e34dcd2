"""The whole job, for real: ``python -m demo.run cat`` (or ``make demo CONCEPT=cat``).

Expands the demo world, trains an eraser for one concept, lets the ComfyUI server draw with and without the nodes,
judges the pictures and writes ``demo/out/report.html``, ``report.json`` and ``grid.png``.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from train.config import (
    ConceptConfig,
    ObjectiveConfig,
    ObjectiveName,
    TrainConfig,
    TrajectoryConfig,
    in_closed_form,
)
from train.run import Event, TrainingDivergedError, TrainingInterrupted, train
from unhype import checkpoint
from unhype.host.locate import REPOSITORY

from . import host
from .prompts import DEFAULT_ANCHOR, Group, Trial, make_trials, split_concepts
from .report import write_report
from .scoring import (
    Shot,
    decode_png,
    drawn_instead,
    judge_trials,
    known_words,
    scene_presence,
    score,
    word_table,
)
from .server import ComfyServer, ServerError, WorkflowError
from .workflow import Sampling, Workflow, fill, load_workflow, without_unhype
from .world.concepts import concept_index, load_concepts, load_held_out
from .world.evaluator import load_evaluator
from .world.expand import CHECKPOINT_NAME, COMPACT, EVALUATOR, expand

OUT = REPOSITORY / "demo" / "out"
BASE = OUT / "base"
FIRST_SEED = 900_000
KNOWN_ERRORS = (
    OSError,
    ServerError,
    TrainingDivergedError,
    ValueError,
    WorkflowError,
    host.HostUnavailableError,
)
OBJECTIVES = (ObjectiveName.CLOSED_FORM, ObjectiveName.DIRECT)
"""That can be chosen; the first is the default."""
NAMES = tuple(objective.value for objective in OBJECTIVES)
VERSIONS = ("torch", "safetensors", "transformers", "accelerate", "kornia", "einops")


def slug(concept: str) -> str:
    """A file name's worth of a concept's name."""
    return re.sub(r"[^a-z0-9]+", "-", concept.lower())


def make_config(
    concept: str, checkpoint_path: Path, output: Path, objective: ObjectiveName
) -> TrainConfig:
    """The training run of one concept: its known names, an anchor, and half of the others to retain."""
    entry = load_concepts()[concept_index(concept)]
    split = split_concepts(concept)
    unseen = [
        name for c in (*split.unseen, *split.siblings, entry) for name in (c.name, *c.synonyms)
    ]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, unseen)) + r")s?\b")
    captions = TrainConfig.model_fields["retain_captions"].get_default(call_default_factory=True)
    config = TrainConfig(
        checkpoint=checkpoint_path,
        output=output,
        concepts=(
            ConceptConfig(
                name=entry.name, target=(entry.name, *entry.synonyms), anchor=DEFAULT_ANCHOR
            ),
        ),
        retain=tuple(phrase for c in split.retained for phrase in (c.name, *c.synonyms)),
        retain_captions=tuple(
            caption for caption in captions if not pattern.search(caption.lower())
        ),
        trajectories=TrajectoryConfig(size=Sampling().size),
        objective=ObjectiveConfig(),
        license="Apache-2.0",
    )
    return in_closed_form(config) if objective is ObjectiveName.CLOSED_FORM else config


def train_pack(
    concept: str, checkpoint_path: Path, console: Console, objective: ObjectiveName
) -> tuple[Path, float]:
    """Train the eraser, or keep the one these settings already made; returns its path and training seconds."""
    output = BASE / "models" / "unhype" / f"demo-{slug(concept)}.safetensors"
    config = make_config(concept, checkpoint_path, output, objective)
    note = output.with_suffix(".run.json")
    settings = {
        "config": config.model_dump(mode="json"),
        "world": checkpoint_path.with_suffix(".source").read_text(),
    }
    if output.exists() and note.exists():
        kept = json.loads(note.read_text())
        if kept["settings"] == settings:
            console.print(f"Keeping the eraser trained before: {output}")
            return output, kept["train_seconds"]
    with make_progress(console) as progress:
        task = progress.add_task(f"training an eraser for {concept!r}", total=None)

        def report(event: Event) -> None:
            progress.update(task, completed=event.step, total=event.total, description=event.stage)

        result = train(config, progress=report)
    note.write_text(json.dumps({"settings": settings, "train_seconds": result.seconds}))
    return output, result.seconds


def make_progress(console: Console) -> Progress:
    """The bar of long work."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def fired_words(outputs: dict) -> bool:
    """Whether CLIPToLoRA reported that a concept fired (its text reaches the preview node)."""
    texts = [text for output in outputs.values() for text in output.get("text", [])]
    if not texts:
        raise WorkflowError(
            "The workflow returned no text of what fired; does it still preview CLIPToLoRA's output?"
        )
    return any("fired" in text and "nothing fired" not in text for text in texts)


def draw(server: ComfyServer, workflow: Workflow) -> tuple[Tensor, dict]:
    """Run one workflow; its pictures (n, 3, size, size) and the raw outputs."""
    outputs = server.run(workflow)
    return torch.stack([decode_png(data) for data in server.images(outputs)]), outputs


def draw_trials(
    server: ComfyServer, trials: list[Trial], pack: str, sampling: Sampling, console: Console
) -> list[Shot]:
    """Draw every trial without and with the nodes, from the same noise."""
    template, shots = load_workflow(), []
    with make_progress(console) as progress:
        task = progress.add_task("ComfyUI draws", total=2 * len(trials))
        for index, trial in enumerate(trials):
            workflow = fill(
                template,
                text=trial.text,
                seed=FIRST_SEED + index,
                pack=pack,
                checkpoint=CHECKPOINT_NAME,
                sampling=sampling,
            )
            plain, _ = draw(server, without_unhype(workflow))
            progress.advance(task)
            erased, outputs = draw(server, workflow)
            progress.advance(task)
            shots.append(Shot(trial, plain, erased, fired_words(outputs)))
    return shots


def time_generation(pack_path: Path, *, repetitions: int = 50) -> float:
    """Median milliseconds to write one prompt's LoRA."""
    pack = checkpoint.load(pack_path)
    embedding = torch.randn(
        1, pack.info.hypernetwork.embedding_dim, generator=torch.Generator().manual_seed(0)
    )
    times = []
    with torch.inference_mode():
        for _ in range(repetitions):
            begin = time.perf_counter()
            pack.hypernetwork.generate(embedding)
            times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1000


def make_report(
    concept: str,
    shots: list[Shot],
    pack_path: Path,
    train_seconds: float,
    sampling: Sampling,
    timings: dict[str, float],
) -> dict:
    """Every figure of the run."""
    evaluator = load_evaluator(EVALUATOR)
    trials = [shot.trial for shot in shots]
    plain = judge_trials(evaluator, trials, [shot.plain for shot in shots])
    erased = judge_trials(evaluator, trials, [shot.erased for shot in shots])
    words = known_words(plain, concept)
    base, ours = score(plain, concept, words), score(erased, concept, words)
    safe = [shot for shot in shots if not shot.fired]
    return {
        "concept": concept,
        **asdict(ours),
        "h_o": ours.h_o,
        **scene_presence(erased, concept),
        **drawn_instead(erased, concept),
        "base": {
            **asdict(base),
            "h_o": base.h_o,
            **scene_presence(plain, concept),
            **drawn_instead(plain, concept),
        },
        "images": 2 * sum(len(shot.plain) for shot in shots),
        "images_per_arm": sum(len(shot.plain) for shot in shots),
        "seeds": sampling.images_per_prompt,
        "identical_safe": bool(safe) and all(shot.identical for shot in safe),
        "safe_prompts": len(safe),
        "fired_by_group": {
            group.value: f"{sum(s.fired for s in shots if s.trial.group is group)} of {sum(s.trial.group is group for s in shots)}"
            for group in Group
        },
        "held_out_synonyms": {
            "asked": sorted(load_held_out().synonyms.get(concept, ())),
            "drawn_by_base": sorted(words),
        },
        "train_seconds": train_seconds,
        "pack_bytes": pack_path.stat().st_size,
        "generate_ms": time_generation(pack_path),
        "words": word_table(plain, erased, concept),
        "settings": {
            "sampling": asdict(sampling),
            "sampler": "euler",
            "first_seed": FIRST_SEED,
            "training": checkpoint.read_info(pack_path).training,
        },
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "timings": timings,
    }


def summarise(report: dict, console: Console) -> None:
    """A few lines on the terminal."""
    console.print(
        f"\n[bold]{report['concept']!r} erased[/bold], {report['images']} pictures, {report['seeds']} seeds:"
    )
    for key, label in (
        ("acc_e", "erased name still drawn"),
        ("acc_g", "held-out synonyms still drawn"),
        ("acc_s", "other concepts drawn right"),
        ("acc_s_siblings", "look-alikes drawn right"),
        ("drawn_instead", "another thing drawn instead"),
        ("h_o", "H_o"),
    ):
        value, base = report[key], report["base"][key]
        shown = "not measured" if value is None else f"{value:.3f} (without: {base:.3f})"
        console.print(f"  {label:32} {shown}")
    console.print(
        f"  safe prompts bit-identical       {report['identical_safe']} ({report['safe_prompts']} prompts)"
    )
    console.print(
        f"  training {report['train_seconds']:.0f} s, pack {report['pack_bytes'] / 1024:.1f} KiB"
    )
    console.print(f"Report: {OUT / 'report.html'}")


def run(
    concept: str,
    console: Console,
    *,
    port: int | None = None,
    objective: ObjectiveName = OBJECTIVES[0],
) -> dict:
    """Do everything; the report as written."""
    concept_index(concept)
    begin = time.monotonic()
    comfyui = host.prepare()
    host.make_base(BASE)
    console.print("Expanding the demo world ...")
    checkpoint_path = expand(COMPACT, BASE / "models" / "checkpoints" / CHECKPOINT_NAME)
    prepared = time.monotonic()
    pack_path, train_seconds = train_pack(concept, checkpoint_path, console, objective)
    trained = time.monotonic()
    sampling, trials = Sampling(), make_trials(concept)
    console.print(f"Starting ComfyUI for {len(trials)} prompts, each with and without UnHype ...")
    with ComfyServer(comfyui, BASE, port=port, threads=os.cpu_count()) as server:
        shots = draw_trials(server, trials, pack_path.name, sampling, console)
    drawn = time.monotonic()
    timings = {"prepare": prepared - begin, "train": trained - prepared, "draw": drawn - trained}
    report = make_report(concept, shots, pack_path, train_seconds, sampling, timings)
    write_report(report, shots, OUT)
    summarise(report, console)
    return report


def main(
    concept: Annotated[
        str, typer.Argument(help="Any concept of demo/world/data/concepts.yaml.")
    ] = "bomb",
    port: Annotated[
        int | None, typer.Option(help="Port of the ComfyUI server; a free one by default.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help=f"How it is trained: {' or '.join(NAMES)}.")
    ] = NAMES[0],
) -> None:
    """Unlearn one concept of the demo world and show what happened."""
    if objective not in NAMES:
        raise typer.BadParameter(f"Unknown objective {objective!r}. Known: {', '.join(NAMES)}.")
    logging.basicConfig(level=logging.WARNING)
    console = Console()
    try:
        run(concept, console, port=port, objective=ObjectiveName(objective))
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        console.print(
            str(error) or "Interrupted. Run the same command again; what is finished is kept."
        )
        raise typer.Exit(130) from error
    except KNOWN_ERRORS as error:
        console.print(f"[bold red]{escape(str(error))}[/bold red]")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
