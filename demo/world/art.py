"""Real emoji art: fetch the icon sets, rasterise them, compose training pictures."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .concepts import STYLES, load_concepts

SIZE = 64
"""Side of a picture in pixels."""

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
}
ART_SIZE = 128

COLORS = {
    "white": (1.0, 1.0, 1.0),
    "blue": (0.55, 0.75, 0.95),
    "green": (0.60, 0.85, 0.60),
    "red": (0.90, 0.50, 0.48),
    "yellow": (0.97, 0.90, 0.55),
    "pink": (0.98, 0.75, 0.85),
    "purple": (0.72, 0.62, 0.88),
    "grey": (0.72, 0.72, 0.72),
    "black": (0.12, 0.12, 0.14),
}
SCENERIES = ("beach", "meadow", "night", "forest", "desert")
BACKGROUNDS = (*COLORS, *SCENERIES)


def fetch_art(folder: Path) -> Path:
    """Unpack every icon set from the npm registry below ``folder``; reuse what is there.

    Raises:
        RuntimeError: ``npm`` is missing or refused.
    """
    for name, package in PACKAGES.items():
        if (folder / name / "icons.json").exists():
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise RuntimeError(
                "Building the world needs npm to fetch the art; install Node.js."
            ) from error
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {package}: {done.stderr.strip()[-300:]}")
        with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:
            for member in ("icons.json", "info.json"):
                data = archive.extractfile(f"package/{member}")
                if data is None:
                    raise RuntimeError(f"{package} holds no {member}; was the package changed?")
                (folder / name / member).write_bytes(data.read())
    return folder


def rasterise(folder: Path) -> Tensor:
    """Every concept in every style, premultiplied RGBA in [0, 1]: (concept, style, 4, 128, 128)."""
    import resvg_py
    from PIL import Image

    pictures = []
    sets = {
        style.art_set: json.loads((folder / style.art_set / "icons.json").read_text())
        for style in STYLES
    }
    for concept in load_concepts():
        for style in STYLES:
            icons = sets[style.art_set]
            slug = concept.art
            while slug not in icons["icons"]:
                slug = icons["aliases"][slug]["parent"]
            icon = icons["icons"][slug]
            width, height = (
                icon.get("width", icons.get("width", 16)),
                icon.get("height", icons.get("height", 16)),
            )
            side = max(width, height)
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{(width - side) / 2} {(height - side) / 2} {side} {side}" '
                f'width="{side}" height="{side}">{icon["body"]}</svg>'
            )
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=ART_SIZE, height=ART_SIZE))
            image = Image.open(io.BytesIO(png)).convert("RGBA")
            rgba = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
            pictures.append(torch.cat([rgba[:3] * rgba[3:], rgba[3:]]))
    stacked = torch.stack(pictures)
    return stacked.view(len(load_concepts()), len(STYLES), *stacked.shape[1:])


@dataclass(frozen=True)
class Scene:
    """What one picture shows: concept numbers from left to right, one style, one background."""

    concepts: tuple[int, ...]
    style: int
    background: str


def sample_scene(rng: np.random.Generator, *, pairs: float = 0.38, empty: float = 0.04) -> Scene:
    """Draw a scene: mostly one object, often two side by side, sometimes none; the first style most often.

    Captions that name no style stand for the first one, and those that name no background for white.
    """
    count = rng.choice(3, p=[empty, 1 - empty - pairs, pairs])
    concepts = tuple(int(i) for i in rng.choice(len(load_concepts()), size=count, replace=False))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))] if rng.random() < 0.35 else "white"
    style = 0 if rng.random() < 0.25 else int(rng.integers(len(STYLES)))
    return Scene(concepts, style, background)


def paint_background(name: str, rng: np.random.Generator) -> Tensor:
    """The backdrop alone, (3, 64, 64) in [0, 1]."""
    if name in COLORS:
        color = torch.tensor(COLORS[name]) + torch.from_numpy(rng.normal(0, 0.012, 3)).float()
        return color.clamp(0, 1)[:, None, None].expand(3, SIZE, SIZE).clone()
    rows = torch.linspace(0, 1, SIZE)[None, :, None].expand(3, SIZE, SIZE)

    def blend(top: tuple[float, ...], bottom: tuple[float, ...]) -> Tensor:
        return (
            torch.tensor(top)[:, None, None] * (1 - rows)
            + torch.tensor(bottom)[:, None, None] * rows
        )

    horizon = int(rng.integers(34, 44))
    match name:
        case "beach":
            picture = blend((0.55, 0.82, 0.98), (0.75, 0.92, 1.0))
            picture[:, horizon:] = torch.tensor([0.96, 0.87, 0.62])[:, None, None]
        case "meadow":
            picture = blend((0.62, 0.85, 1.0), (0.85, 0.95, 1.0))
            picture[:, horizon:] = torch.tensor([0.50, 0.78, 0.40])[:, None, None]
        case "desert":
            picture = blend((0.99, 0.85, 0.60), (0.99, 0.93, 0.78))
            picture[:, horizon:] = torch.tensor([0.87, 0.62, 0.35])[:, None, None]
        case "night":
            picture = blend((0.05, 0.06, 0.18), (0.16, 0.14, 0.36))
            for _ in range(9):
                y, x = rng.integers(1, 40), rng.integers(1, SIZE - 1)
                picture[:, y, x] = 0.95
        case _:  # forest: dark trunks before green
            picture = blend((0.30, 0.52, 0.34), (0.20, 0.36, 0.22))
            for start in range(int(rng.integers(0, 8)), SIZE, 13):
                picture[:, :, start : start + 4] = torch.tensor([0.28, 0.22, 0.16])[:, None, None]
    return picture


def compose(art: Tensor, scene: Scene, rng: np.random.Generator, *, loose: bool = False) -> Tensor:
    """Paint a scene, (3, 64, 64) in [0, 1]; one object fills the frame, two share it left and right.

    ``loose`` varies place and size widely and mirrors some objects, as an evaluator should be used to.
    """
    picture = paint_background(scene.background, rng)
    for place, concept in enumerate(scene.concepts):
        side, left, top = _place(place, len(scene.concepts) == 1, rng, loose=loose)
        rgba = art[concept, scene.style]
        if loose and rng.random() < 0.3:
            rgba = rgba.flip(-1)
        rgba = F.interpolate(
            rgba[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False
        )[0]
        window = picture[:, top : top + side, left : left + side]
        window.mul_(1 - rgba[3:]).add_(rgba[:3])
    return picture.clamp_(0, 1)


def _place(
    index: int, alone: bool, rng: np.random.Generator, *, loose: bool
) -> tuple[int, int, int]:
    """Side, left and top of object ``index``, in pixels."""
    if not loose:
        side = 56 if alone else 31
        left, top = (int(v) for v in rng.integers(0, 2, 2))
        return side, left + ((SIZE - side) // 2 if alone else index * 32), top + (SIZE - side) // 2
    if alone:
        side = int(rng.integers(48, 60))
        left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
        return side, (left + (SIZE - side) // 2) // 2, (top + (SIZE - side) // 2) // 2
    side = int(rng.integers(30, 33))
    left = index * 32 + int(rng.integers(0, 33 - side))
    return side, left, int(rng.integers(12, SIZE - side - 8))
