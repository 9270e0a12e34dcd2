"""How often ordinary captions open a pack's gate, and what they draw then: ``python -m benchmarks.false_fires CAPTIONS PACK ...``.

The first captions choose a threshold as ``unhype calibrate`` does, the others are counted, and some of those that open nothing are
drawn by ComfyUI with the guard and without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from demo.world.bench import DemoWorld
from demo.world.concepts import load_held_out
from train.calibrate import CalibrationError, in_batches, read_captions, recalibrate
from train.denoiser import reader
from train.evaluate.base import PictureModel
from train.phrases import mentions
from unhype import checkpoint
from unhype.checkpoint import Pack
from unhype.host.bypass import find_targets
from unhype.host.guard import Guard

from . import machine
from .models import Subject, load_demo
from .thresholds import EMBEDDED_AT_ONCE, fired

SIZE, STEPS, GUIDANCE, SAMPLER, SCHEDULER = 64, 12, 5.0, "euler", "normal"
MOST_TOKENS = 77

Draw = Callable[[Pack, str, int], bool]
"""Whether a caption's picture from a seed is the same, to the last bit, with the guard."""


@dataclass(frozen=True)
class FalseFires:
    """What ordinary captions do with one pack.

    Attributes:
        counted: captions that no threshold was chosen on.
        before, after: share of them that fire at the pack's threshold and at the chosen one.
        missed_before, missed_after: share of the prompts for erased concepts that then do not.
        drawn, identical: pictures of captions that fire nothing, and how many the guard left as they are, to the last bit.
        refused: why no threshold was chosen.
    """

    concepts: int
    calibrated_on: int
    counted: int
    before: float
    after: float | None = None
    missed_before: float | None = None
    missed_after: float | None = None
    drawn: int = 0
    identical: int = 0
    refused: str = ""


def measure(
    path: Path,
    captions: Path,
    model: PictureModel,
    draw: Draw | None,
    *,
    calibrate_on: int,
    budget: float,
    pictures: int,
    other_names: Sequence[str] = (),
) -> FalseFires:
    """One pack.

    Args:
        captions: one a line; those that name what the pack erases, or are too long to be read at once, are left out.
        model: whose text encoder reads them.
        draw: none if the pack does not fit what draws.
        calibrate_on: how many of the captions a threshold is chosen on.
        budget: share of these that may fire.
        pictures: captions to draw.
        other_names: names of the erased that the pack does not know.
    """
    pack = checkpoint.load(path)
    texts = [
        text
        for text in read_captions(captions, pack.info).texts
        if not mentions(text, other_names) and len(model.token_ids([text])[0]) < MOST_TOKENS
    ]
    own, others = texts[:calibrate_on], texts[calibrate_on:]
    if not others:
        raise ValueError(
            f"{captions} has {len(texts)} captions that do not name the erased; calibrating takes {calibrate_on}, and none "
            "is left to count. Give more captions, or --calibrate-on fewer."
        )
    embed = in_batches(reader(model, pack), EMBEDDED_AT_ONCE, lambda *_: None)
    spoken = embed(others)
    fires = fired(pack.gate, spoken)
    quiet = [text for text, acts in zip(others, fires.tolist(), strict=True) if not acts]
    chosen = quiet[:: max(1, len(quiet) // pictures)][:pictures] if draw and pictures else []
    found = FalseFires(
        concepts=len(pack.info.concepts),
        calibrated_on=len(own),
        counted=len(others),
        before=fires.float().mean().item(),
        drawn=len(chosen),
        identical=sum(draw(pack, text, seed) for seed, text in enumerate(chosen)) if draw else 0,
    )
    try:
        result = recalibrate(pack, embed, own, budget)
    except CalibrationError as error:
        return replace(found, refused=str(error))
    after = fired(pack.gate, spoken, result.threshold)
    return replace(
        found,
        after=after.float().mean().item(),
        missed_before=result.before.miss_rate,
        missed_after=result.calibration.miss_rate,
    )


def drawing(subject: Subject) -> Draw:
    """Draws with ComfyUI's own sampler, as KSampler does."""

    @torch.inference_mode()
    def draw(pack: Pack, text: str, seed: int) -> bool:
        import comfy.sample

        from unhype.host.apply import guard_model

        model, clip = guard_model(subject.patcher, subject.clip, Guard(pack))
        latents = []
        for patcher, encoder in ((subject.patcher, subject.clip), (model, clip)):
            positive, negative = (
                encoder.encode_from_tokens_scheduled(encoder.tokenize(words))
                for words in (text, "")
            )
            empty = torch.zeros(1, 4, SIZE // 8, SIZE // 8)
            latents.append(
                comfy.sample.sample(
                    patcher,
                    comfy.sample.prepare_noise(empty, seed),
                    STEPS,
                    GUIDANCE,
                    SAMPLER,
                    SCHEDULER,
                    positive,
                    negative,
                    empty,
                    disable_pbar=True,
                    seed=seed,
                )
            )
        return torch.equal(*latents)

    return draw


def show(found: dict[str, FalseFires], console: Console) -> None:
    """One row for each pack."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    headings = ("captions", "fire", "after", "missed", "after", "silent pictures identical")
    table = Table("pack", "concepts", *headings)
    for name, row in found.items():
        table.add_row(
            name,
            str(row.concepts),
            str(row.counted),
            share(row.before),
            share(row.after) or "refused",
            share(row.missed_before),
            share(row.missed_after),
            f"{row.identical} of {row.drawn}" if row.drawn else "",
        )
    console.print(table)


def main(
    captions: Annotated[Path, typer.Argument(help="A text file of ordinary captions, one a line.")],
    packs: Annotated[list[Path], typer.Argument(metavar="PACK ...", help="Of the demo world.")],
    calibrate_on: Annotated[
        int, typer.Option(min=1, help="Captions that a threshold is chosen on.")
    ] = 3000,
    budget: Annotated[
        float, typer.Option(min=0, max=1, help="Share of them that may fire.")
    ] = 0.001,
    pictures: Annotated[
        int,
        typer.Option(
            min=0,
            help="Captions that fire nothing, to draw with the guard; none for packs of `unhype compare`, which are made for the world's narrow twin.",
        ),
    ] = 24,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = machine.OUT
    / "false_fires.json",
) -> None:
    """Count how many ordinary captions open a pack's gate."""
    console = Console()
    described = machine.start(console)
    model, synonyms = DemoWorld().model(), load_held_out().synonyms
    found: dict[str, FalseFires] = {}
    with tempfile.TemporaryDirectory() as folder:
        subject = load_demo(Path(folder))
        targets = find_targets(subject.network, subject.family.targets)
        draw = drawing(subject)
        for path in packs:
            info = checkpoint.read_info(path)
            names = [word for c in info.concepts for word in synonyms.get(c.name, ())]
            console.print(f"{path}: reading captions")
            found[f"{path.parent.name}/{path.stem}"] = measure(
                path,
                captions,
                model,
                draw if info.targets == targets else None,
                calibrate_on=calibrate_on,
                budget=budget,
                pictures=pictures,
                other_names=names,
            )
    show(found, console)
    rows = {name: asdict(row) for name, row in found.items()}
    machine.write(output, {"machine": described, "false_fires": rows}, console)


if __name__ == "__main__":
    typer.run(main)
