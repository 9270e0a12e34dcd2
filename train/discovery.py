"""Ask the frozen model which words of its own vocabulary it draws as a concept, and which near ones it does not.

Nobody lists every name of a thing, nor everything that looks like it. Words near a concept in the text encoder are candidates;
the model's own predictions say which of them mean the same to it. No picture is drawn, and no list of synonyms is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from unhype.host.denoise import TextBatch

from .config import ConceptConfig, DiscoveryConfig, TrainConfig
from .denoiser import DenoiserLike
from .phrases import forms, mentions
from .prompts import MINORS, PLAIN_TEMPLATE, fill, target_phrases
from .trajectories import Tick

log = logging.getLogger("unhype")

STEPS, STOPS = 12, (0, 2, 4, 6)
"""Of the rollouts whose states are asked about: what is drawn is decided early."""
PICTURES = 4


@runtime_checkable
class Speaking(Protocol):
    """A model that can list the words it was made for."""

    def words(self) -> list[str]:
        """Whole words of the text encoder's vocabulary, the most frequent ones first."""
        ...


@dataclass(frozen=True)
class Word:
    """A candidate.

    Attributes:
        share: squared distance of predictions for it from those for the concept, in units of that of the anchor's.
    """

    text: str
    share: float


@dataclass(frozen=True)
class Discovered:
    """Words near one concept: ``same`` means it to the model, ``different`` does not."""

    same: tuple[Word, ...]
    different: tuple[Word, ...]


def discover(config: TrainConfig, denoiser: DenoiserLike, tick: Tick) -> tuple[Discovered, ...]:
    """For every concept, sort the words nearest to its phrases by what the model predicts for them."""
    settings = config.discovery
    vocabulary = _vocabulary(config, denoiser)
    if not vocabulary:
        return tuple(Discovered((), ()) for _ in config.concepts)
    num = len(config.concepts)
    near = _nearest(config, denoiser, vocabulary)
    best: dict[str, tuple[float, int]] = {}
    seen: list[list[Word]] = []
    for index, (concept, words) in enumerate(zip(config.concepts, near, strict=True)):
        judged = _ask(config, denoiser, concept, words, seed=config.seed + index)
        seen.append(judged)
        for word in judged:
            best[word.text] = min(best.get(word.text, (1e9, -1)), (word.share, index))
        tick(index + 1, num)
    found = []
    for index, words in enumerate(seen):
        same = [w for w in words if w.share <= settings.same and best[w.text][1] == index]
        # What is another concept's word is not to be kept either.
        different = [
            w
            for w in words
            if w.share >= settings.different and best[w.text][0] >= settings.different
        ]
        found.append(Discovered(tuple(same), tuple(different)))
    for concept, words in zip(config.concepts, found, strict=True):
        log.info(
            "%s is also drawn for: %s", concept.name, ", ".join(w.text for w in words.same) or "-"
        )
    return tuple(found)


def widen(config: TrainConfig, found: Sequence[Discovered]) -> TrainConfig:
    """The config with words of the same meaning among the targets, and look-alikes among what stays."""
    concepts = tuple(
        concept.model_copy(
            update={"target": (*concept.target, *(word.text for word in words.same))}
        )
        for concept, words in zip(config.concepts, found, strict=True)
    )
    targets = {form for c in concepts for phrase in c.target for form in forms(phrase)}
    kept = [word.text for words in found for word in words.different]
    added = [word for word in dict.fromkeys(kept) if not forms(word) & targets]
    retain = tuple(dict.fromkeys((*config.retain, *added)))
    return config.model_copy(update={"concepts": concepts, "retain": retain})


def describe(found: Sequence[Discovered], concepts: Sequence[ConceptConfig]) -> dict[str, object]:
    """For the pack: what each concept's training took in beside its own phrases."""
    return {
        concept.name: {
            "same": [word.text for word in words.same],
            "different": [word.text for word in words.different],
        }
        for concept, words in zip(concepts, found, strict=True)
    }


def _vocabulary(config: TrainConfig, denoiser: DenoiserLike) -> list[str]:
    """The most frequent words that the config does not name itself; none for minors, of whom nothing is drawn to learn from."""
    settings: DiscoveryConfig = config.discovery
    if not settings.words or not isinstance(denoiser, Speaking):
        return []
    named = {
        form
        for phrase in (*target_phrases(config.concepts), *config.retain, *settings.exclude)
        for form in forms(phrase)
    }
    words = (
        word for word in denoiser.words() if not forms(word) & named and not mentions(word, MINORS)
    )
    return list(islice(words, settings.words))


def _nearest(
    config: TrainConfig, denoiser: DenoiserLike, vocabulary: Sequence[str]
) -> list[list[str]]:
    """For every concept the words whose prompts lie nearest to those of its phrases."""
    size = 256
    prompts = [fill(PLAIN_TEMPLATE, word) for word in vocabulary]
    parts = [
        denoiser.embed_pooled(prompts[start : start + size]).float().cpu()
        for start in range(0, len(prompts), size)
    ]
    embedded = torch.cat(parts)
    center, spread = embedded.mean(0), embedded.std(0).clamp(min=1e-6)

    def direction(vectors: Tensor) -> Tensor:
        return F.normalize((vectors - center) / spread, dim=-1)

    words, nearest = direction(embedded), []
    for concept in config.concepts:
        phrases = denoiser.embed_pooled([fill(PLAIN_TEMPLATE, phrase) for phrase in concept.target])
        similarity = (words @ direction(phrases.float().cpu()).mT).amax(1)
        count = min(config.discovery.candidates, len(vocabulary))
        nearest.append([vocabulary[index] for index in similarity.topk(count).indices.tolist()])
    return nearest


@torch.no_grad()
def _ask(
    config: TrainConfig,
    denoiser: DenoiserLike,
    concept: ConceptConfig,
    words: Sequence[str],
    *,
    seed: int,
) -> list[Word]:
    """What the model predicts for each word on states of the concept's own pictures."""
    settings = config.trajectories
    prompts = [fill(PLAIN_TEMPLATE, text) for text in (concept.name, concept.anchor, *words)]
    text = TextBatch.cat(
        [
            denoiser.embed(prompts[i : i + settings.batch_size])
            for i in range(0, len(prompts), settings.batch_size)
        ]
    )
    states, sigmas = denoiser.rollout(
        text.rows([0] * PICTURES),
        steps=STEPS,
        guidance_scale=settings.guidance_scale,
        seed=seed,
        size=settings.size,
        stop_indices=STOPS,
    )
    total = torch.zeros(len(prompts))
    for latents, sigma in zip(states, sigmas, strict=True):
        for x_t in latents:
            parts = []
            for start in range(0, len(prompts), settings.batch_size):
                rows = list(range(start, min(start + settings.batch_size, len(prompts))))
                x = x_t[None].expand(len(rows), *x_t.shape)
                parts.append(denoiser.predict(x, sigma.expand(len(rows)), text.rows(rows), None))
            prediction = torch.cat(parts).float().cpu()
            distance = (prediction - prediction[0]).square().flatten(1).mean(1)
            total += distance / distance[1].clamp(min=1e-12)
    shares = (total / (len(sigmas) * PICTURES)).tolist()
    return [Word(word, share) for word, share in zip(words, shares[2:], strict=True)]
