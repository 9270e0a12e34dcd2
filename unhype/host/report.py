"""What a pack makes of a prompt: figures, text and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..checkpoint import Generated, Pack
from .generate import DynamicLoRA, describe

LABEL, BAR, ROW, PAD = 230, 420, 18, 14
INK, PAPER, QUIET, FIRED, MARK = "#1c1c1c", "#ffffff", "#9db4c8", "#c8452f", "#555555"
MOST_CONCEPTS = 24


def to_json(lora: DynamicLoRA) -> dict[str, Any]:
    """Gate values, what fired, and the Frobenius norm of every layer's dW, entry by entry; plain data for JSON."""
    return {
        "pack": lora.pack.name,
        "family": lora.pack.info.family,
        "threshold": threshold(lora.pack),
        "entries": [_entry(lora.pack, generated) for generated in lora.entries],
    }


def threshold(pack: Pack) -> float:
    """The probability from which the pack's concepts fire."""
    return pack.info.gate.threshold if pack.threshold is None else pack.threshold


def to_text(lora: DynamicLoRA) -> str:
    """The same for people."""
    lines = [
        f"{lora.pack.name} ({lora.pack.info.spec.title}), threshold {threshold(lora.pack):.2f}"
    ]
    for index, generated in enumerate(lora.entries):
        entry = _entry(lora.pack, generated)
        lines.append(f"entry {index + 1}: {describe(lora.pack, generated)}")
        for name, concept in entry["concepts"].items():
            state = "fired" if concept["fired"] else "off" if not concept["active"] else ""
            lines.append(f"  {name:24} {concept['probability']:.4f} {state}".rstrip())
        norms = entry["norms"]
        total = sum(value**2 for value in norms.values()) ** 0.5
        largest = max(norms, key=norms.__getitem__)
        lines.append(
            f"  |dW| {total:.4f} over {len(norms)} layers, largest {norms[largest]:.4f} in {largest}"
        )
    return "\n".join(lines)


def to_chart(lora: DynamicLoRA) -> Tensor:
    """Bars of the gate and of |dW| for every entry, as the host's IMAGE: (entries, height, width, 3) in [0, 1]."""
    pictures = [_draw(lora.pack, generated) for generated in lora.entries]
    height = max(picture.height for picture in pictures)
    result = []
    for picture in pictures:
        page = Image.new("RGB", (picture.width, height), PAPER)
        page.paste(picture)
        result.append(torch.from_numpy(np.asarray(page).copy()).float() / 255)
    return torch.stack(result)


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    label: str
    value: float
    text: str
    color: str


def _entry(pack: Pack, generated: Generated) -> dict[str, Any]:
    reading = generated.reading
    probability, fired = reading.probability.amax(0).tolist(), reading.fired.any(0).tolist()
    shares = generated.shares.amax(0).tolist()
    rows = zip(pack.info.concept_names, probability, fired, pack.active, shares, strict=True)
    concepts = {
        name: {"probability": p, "fired": fires, "active": active, "strength": share}
        for name, p, fires, active, share in rows
    }
    norms = generated.factors.squared_norms().amax(0).sqrt().tolist()
    return {
        "concepts": concepts,
        "fired": [name for name, concept in concepts.items() if concept["fired"]],
        "nearest": max(concepts, key=lambda name: concepts[name]["probability"]),
        "norms": {target.key: norm for target, norm in zip(pack.info.targets, norms, strict=True)},
    }


def _draw(pack: Pack, generated: Generated) -> Image.Image:
    """One entry's two groups of bars."""
    entry = _entry(pack, generated)
    ordered = sorted(entry["concepts"].items(), key=lambda item: -item[1]["probability"])
    gate = [
        Bar(
            name,
            concept["probability"],
            f"{concept['probability']:.3f}",
            FIRED if concept["fired"] else QUIET,
        )
        for name, concept in ordered[:MOST_CONCEPTS]
    ]
    more = len(ordered) - len(gate)
    largest = max(entry["norms"].values()) or 1.0
    color = FIRED if entry["fired"] else QUIET
    layers = [
        Bar(key, norm / largest, f"{norm:.3f}", color) for key, norm in entry["norms"].items()
    ]
    groups = (
        (
            "gate" + (f" (the highest {len(gate)} of {len(ordered)} concepts)" if more else ""),
            gate,
            threshold(pack),
        ),
        ("|dW| of each layer", layers, None),
    )
    height = PAD + sum(ROW * (len(bars) + 1) + PAD for _, bars, _ in groups)
    picture = Image.new("RGB", (LABEL + BAR + 80, height), PAPER)
    draw, top = ImageDraw.Draw(picture), PAD
    for title, bars, mark in groups:
        top = _draw_group(draw, top, title, bars, mark) + PAD
    return picture


def _draw_group(
    draw: ImageDraw.ImageDraw, top: int, title: str, bars: Sequence[Bar], mark: float | None
) -> int:
    """A title and its bars from ``top`` on, with a line at ``mark``; returns where they end."""
    font = ImageFont.load_default(12)
    draw.text((PAD, top), title, INK, font)
    begin = top = top + ROW
    for bar in bars:
        label = bar.label
        while font.getlength(label) > LABEL - 2 * PAD:
            label = f"…{label[2:]}"
        draw.text((PAD, top), label, INK, font)
        draw.rectangle((LABEL, top + 2, LABEL + max(bar.value * BAR, 1), top + ROW - 4), bar.color)
        draw.text((LABEL + BAR + 8, top), bar.text, INK, font)
        top += ROW
    if mark is not None:
        draw.line((LABEL + mark * BAR, begin, LABEL + mark * BAR, top - 2), MARK)
    return top
