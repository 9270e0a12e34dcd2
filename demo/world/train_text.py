"""Distil the world's text encoder from a sentence encoder."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .art import sample_scene
from .captions import OPENINGS, Lexicon, pick, write_caption
from .concepts import load_concepts, load_held_out
from .text_encoder import (
    EOS,
    SentenceTeacher,
    WorldTextEncoder,
    distillation_loss,
    principal_components,
)
from .words import Tokenizer, token_rows, touches_held_out

log = logging.getLogger("unhype")

LONGEST = 26
"""Phrases of more tokens are left out; position embeddings past it stay at their start."""


@dataclass(frozen=True)
class TextTraining:
    """Settings of the distillation."""

    steps: int = 750
    batch: int = 192
    lr: float = 1e-3
    captions: int = 16_000
    word_pairs: int = 6_000


def read_emoji_phrases(folder: Path) -> list[str]:
    """Labels and tags of emojibase-data (MIT), lower case, without any that touch a held-out word."""
    entries = json.loads((folder / "en" / "data.json").read_text())
    raw = [text for entry in entries for text in (entry["label"], *entry.get("tags", []))]
    cleaned = (re.sub(r"[^a-z ]", " ", text.lower()).strip() for text in raw)
    return [text for text in dict.fromkeys(cleaned) if text and not touches_held_out(text)]


def write_phrases(
    words: Sequence[str], emoji: Sequence[str], lexicon: Lexicon, training: TextTraining
) -> list[str]:
    """Every phrase of the distillation: captions, emoji labels, random words; none touches a held-out word."""
    rng = np.random.default_rng(5)
    free = tuple(word for word in words if not touches_held_out(word))
    captions = [write_caption(sample_scene(rng), rng, lexicon) for _ in range(training.captions)]
    pairs = [
        f"{pick(free, rng)} {pick(free, rng)}"
        if rng.random() < 0.5
        else f"a {pick(free, rng)} and a {pick(free, rng)}"
        for _ in range(training.word_pairs)
    ]
    singles = [pick(OPENINGS, rng).format(pick(free, rng)) for _ in range(training.word_pairs)]
    phrases = dict.fromkeys([*captions, *emoji, *pairs, *singles])
    return [phrase for phrase in phrases if not touches_held_out(phrase)]


@torch.no_grad()
def held_out_accuracy(
    encoder: WorldTextEncoder, tokenizer: Tokenizer, template: str = "a photo of a {}"
) -> float:
    """Share of held-out synonyms whose pooled state is closest to their own concept's."""
    names = [concept.name for concept in load_concepts()]
    pairs = [(word, name) for name, words in load_held_out().synonyms.items() for word in words]
    _, words = encoder(tokenizer([template.format(word) for word, _ in pairs]))
    _, concepts = encoder(tokenizer([template.format(name) for name in names]))
    mean = concepts.mean(0)
    nearest = (F.normalize(words - mean, dim=-1) @ F.normalize(concepts - mean, dim=-1).T).argmax(
        -1
    )
    return sum(
        names[i] == name for i, (_, name) in zip(nearest.tolist(), pairs, strict=True)
    ) / len(pairs)


def train_text_encoder(
    words: dict[str, int],
    word_embeddings: Tensor,
    phrases: Sequence[str],
    teacher: SentenceTeacher,
    tokenizer: Tokenizer,
    training: TextTraining,
) -> WorldTextEncoder:
    """Distil the pooled state towards the teacher's centred sentence embedding."""
    torch.manual_seed(0)
    targets = teacher.embed(phrases)
    targets = F.normalize(targets - targets.mean(0), dim=-1)
    tokens = tokenizer(phrases)
    lengths = (tokens == EOS).int().argmax(-1)
    kept = lengths < LONGEST
    tokens, targets, lengths = tokens[kept][:, :LONGEST], targets[kept], lengths[kept]
    by_length = lengths.argsort()
    encoder = WorldTextEncoder(principal_components(word_embeddings, 128), token_rows(words))
    project = nn.Linear(encoder.final.normalized_shape[0], targets.shape[1])
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *project.parameters()], lr=training.lr, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.lr, total_steps=training.steps
    )
    for step in range(training.steps):
        if step % 2:  # neighbours in length, so that little is padding
            start = int(torch.randint(max(len(tokens) - 2000, 1), ()))
            chosen = by_length[start : start + 2000]
            chosen = chosen[torch.randperm(len(chosen))[: training.batch]]
        else:
            chosen = torch.randint(len(tokens), (training.batch,))
        batch = tokens[chosen][:, : int(lengths[chosen].max()) + 1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, pooled = encoder(batch)
        loss = distillation_loss(pooled.float(), targets[chosen], project)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            share = held_out_accuracy(encoder, tokenizer)
            log.info(
                "text step %d: loss %.3f, held-out words nearest their concept %.3f",
                step + 1,
                loss.item(),
                share,
            )
    return encoder.eval()
