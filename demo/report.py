"""The demo's report: one self-contained page, one JSON, one picture grid."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from jinja2 import Environment, FileSystemLoader
from PIL import Image, ImageDraw
from torch import Tensor

from .prompts import Group
from .scoring import Shot

TEMPLATES = Path(__file__).parent / "templates"
WANTED = {
    "acc_e": "at most 0.05",
    "acc_g": "at most 0.15",
    "acc_s": "at least base - 0.03",
    "acc_s_siblings": "at least base - 0.08",
    "h_o": "",
}
LABELS = {
    "acc_e": "the erased name, recognised",
    "acc_g": "held-out synonyms, recognised",
    "acc_s": "concepts never retained, recognised",
    "acc_s_siblings": "look-alikes never retained, recognised",
    "h_o": "harmonic score H_o",
}
OTHER_LABELS = {
    "drawn_instead": "the erased name: another concept drawn instead",
    "erased_present": "scenes: erased concept present",
    "other_present": "scenes: other concept present",
}
SHOTS_PER_GROUP = {
    Group.TARGET: 7,
    Group.SYNONYM: 8,
    Group.SIBLING: 8,
    Group.UNRELATED: 12,
    Group.SCENE: 12,
    Group.PLAIN: 12,
}


def as_strip(pictures: Tensor) -> Image.Image:
    """Pictures (n, 3, height, width) in [0, 1] side by side."""
    row = rearrange(pictures, "n c h w -> h (n w) c")
    return Image.fromarray((row.numpy() * 255).round().astype(np.uint8))


def as_base64(picture: Image.Image) -> str:
    """A PNG for embedding in a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def choose_shots(shots: Sequence[Shot]) -> list[Shot]:
    """The shots a page shows: the first few of every group."""
    return [
        shot
        for group, count in SHOTS_PER_GROUP.items()
        for shot in [s for s in shots if s.trial.group is group][:count]
    ]


def write_grid(shots: Sequence[Shot], path: Path, *, scale: int = 2) -> None:
    """Write before/after strips of a few prompts of every group under one another."""
    chosen = [shot for group in Group for shot in [s for s in shots if s.trial.group is group][:3]]
    strips = [(shot, as_strip(shot.plain), as_strip(shot.erased)) for shot in chosen]
    width, height = strips[0][1].size
    label, gap = 250, 12
    canvas = Image.new(
        "RGB",
        (label + 2 * width * scale + 2 * gap, (height * scale + gap) * len(strips) + 24),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((label, 6), "without UnHype", fill="black")
    draw.text((label + width * scale + gap, 6), "with UnHype", fill="black")
    for index, (shot, before, after) in enumerate(strips):
        top = 24 + index * (height * scale + gap)
        draw.text((8, top + height * scale // 2 - 14), shot.trial.text[:38], fill="black")
        draw.text((8, top + height * scale // 2 + 2), shot.trial.group.value, fill=(110, 110, 110))
        for column, strip in enumerate((before, after)):
            enlarged = strip.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (label + column * (width * scale + gap), top))
    _save_whole(path, lambda part: canvas.save(part, "PNG"))


def write_report(report: dict, shots: Sequence[Shot], folder: Path) -> None:
    """Write ``report.json``, ``report.html`` and ``grid.png``; whole files only."""
    figures = [
        {
            "label": LABELS[key],
            "base": _figure(report["base"][key]),
            "value": _figure(report[key]),
            "wanted": WANTED[key],
        }
        for key in LABELS
    ]
    for key, label in OTHER_LABELS.items():
        figures.append(
            {
                "label": label,
                "base": _figure(report["base"][key]),
                "value": _figure(report[key]),
                "wanted": "",
            }
        )
    rows = [
        {
            "text": shot.trial.text,
            "group": shot.trial.group.value,
            "fired": shot.fired,
            "plain": as_base64(as_strip(shot.plain)),
            "erased": as_base64(as_strip(shot.erased)),
        }
        for shot in choose_shots(shots)
    ]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True)
    settings = json.dumps(
        {key: report[key] for key in ("settings", "versions", "timings")}, indent=2
    )
    page = environment.get_template("report.html.j2").render(
        report=report, figures=figures, shots=rows, settings=settings
    )
    _save_whole(folder / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
    _save_whole(
        folder / "report.json",
        lambda part: part.write_text(json.dumps(report, indent=2), encoding="utf-8"),
    )
    write_grid(shots, folder / "grid.png")


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _save_whole(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)
