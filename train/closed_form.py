"""Edits in closed form: what the text's states become, one edit a concept, without any picture.

Where a denoiser reads the text through linear maps of its states alone, a change of these maps is a change of the states. As in
unified concept editing (UCE, arXiv:2308.14761), the best one is a least-squares problem. Here every concept has its own, of low rank,
which a gate switches; states are paired word by word, and the other words of a prompt are told to become what they are beside
the anchor.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unhype.hypernetwork import EditsHypernetwork

from .config import ConceptConfig, TrainConfig
from .denoiser import DenoiserLike
from .gate import GateMaterial
from .prompts import PLAIN_TEMPLATE, fill, split_templates
from .trajectories import Tick, embed_in_batches

PADDING_READ = 6
"""States of padding read of every prompt: meaning leaks into them."""
TEXTS_AT_ONCE = 64
UNSEEN = 1e-9
"""Share of the most that the layers see in any direction, up to which one counts as unseen."""
SAME = 1e-3
"""Relative difference up to which two states are the same; the batch that they were computed in changes the last digits."""
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 600, 128, 2e-3, 0.05
"""Of telling the concepts apart."""


@dataclass(frozen=True)
class Side:
    """A sentence, and its beginning up to the end of the phrase that matters."""

    text: str
    beginning: str


@dataclass(frozen=True)
class Twin:
    """A prompt that asks for a target, and the same prompt with the anchor in its place."""

    target: Side
    anchor: Side


@torch.no_grad()
def edit_in_closed_form(
    config: TrainConfig,
    denoiser: DenoiserLike,
    hypernetwork: EditsHypernetwork,
    material: GateMaterial,
    tick: Tick,
) -> None:
    """Write every concept's edit into the hypernetwork, and teach it which concept a prompt asks for.

    For states c_i of concept k, states m_i of its anchor in the same sentences, and states r_j of what stays, the edit E_k is the minimum of

        mean |c_i + E c_i - (m_i - gamma (c_i - m_i))|^2 + lambda_r mean |E r_j|^2 + lambda |E|^2,

    of which the hypernetwork keeps the ``rank`` directions that matter most to what the layers make of the c_i.
    """
    settings, rng = config.objective, random.Random(f"unhype edits {config.seed}")
    gram = settings.preserve * _kept_gram(config, denoiser, rng)
    reader = _Reader.of(denoiser.target_weights())
    edits, moved = [], []
    for index, concept in enumerate(config.concepts):
        twins = list(_twins(config, concept, rng))
        c, m = _paired_states(denoiser, twins)
        wanted = (1 + settings.negative_guidance) * (m - c)
        own = gram + c.mT @ c / len(c)
        own += settings.identity * own.diagonal().mean() * torch.eye(len(own)).to(own)
        edit = torch.linalg.solve(own, c.mT @ wanted / len(c))  # c becomes c + c E
        edits.append(edit)
        moved.append(c @ edit @ reader.seen / len(c) ** 0.5)
        tick(index + 1, len(config.concepts))
    _factorize(hypernetwork, reader, edits, moved)
    if len(config.concepts) > 1:
        _tell_apart(hypernetwork, material, config.seed)


@dataclass(frozen=True)
class _Reader:
    """What all layers together see of a state.

    Attributes:
        weights: of the layers, (out, dim) each.
        seen: from states to coordinates in which distances are those between all that the layers make of them, (dim, seen).
        back: from these coordinates to the layers' inputs, (dim, seen).
    """

    weights: Sequence[Tensor]
    seen: Tensor
    back: Tensor

    @staticmethod
    def of(weights: Sequence[Tensor]) -> _Reader:
        gram = torch.zeros(weights[0].shape[1], weights[0].shape[1], dtype=torch.float64)
        for weight in weights:
            w = weight.cpu().double()
            gram += w.mT @ w
        values, vectors = torch.linalg.eigh(gram)
        used = values > UNSEEN * values.max()
        sizes = values[used].sqrt()
        return _Reader(weights, vectors[:, used] * sizes, vectors[:, used] / sizes)


def _factorize(
    hypernetwork: EditsHypernetwork,
    reader: _Reader,
    edits: Sequence[Tensor],
    moved: Sequence[Tensor],
) -> None:
    """Edits (dim, dim), by what the layers see of how they move their concept's states, as ``up``, ``mix`` and ``down``."""
    _, _, principal = torch.linalg.svd(torch.cat(list(moved)), full_matrices=False)
    directions = principal[: hypernetwork.config.directions].mT  # (seen, directions)
    hypernetwork.mix.zero_()
    hypernetwork.down.zero_()
    for index, (edit, own) in enumerate(zip(edits, moved, strict=True)):
        _, _, main = torch.linalg.svd(own @ directions, full_matrices=False)
        mix = main[: hypernetwork.config.rank].mT  # (directions, rank)
        down = (edit @ reader.seen @ directions @ mix).mT  # (rank, dim)
        hypernetwork.mix[index, : mix.shape[0], : mix.shape[1]] = mix.to(hypernetwork.mix)
        hypernetwork.down[index, : len(down)] = down.to(hypernetwork.down)
    for up, weight in zip(hypernetwork.up, reader.weights, strict=True):
        up.zero_()
        up[:, : directions.shape[1]] = (weight.cpu().double() @ reader.back @ directions).to(up)


def _tell_apart(hypernetwork: EditsHypernetwork, material: GateMaterial, seed: int) -> None:
    """Train the shares of the concepts on noisy embeddings of prompts that ask for one."""
    device = hypernetwork.down.device
    generator = torch.Generator().manual_seed(seed)
    embeddings = hypernetwork.standardize(material.positives.to(device))
    optimizer = torch.optim.AdamW(
        hypernetwork.trunk.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    with torch.enable_grad():
        for _ in range(STEPS):
            chosen = torch.randint(len(embeddings), (BATCH_SIZE,), generator=generator)
            x = embeddings[chosen.to(device)]
            x = x + torch.randn(x.shape, generator=generator).to(x)
            loss = F.cross_entropy(hypernetwork.shares(x), material.concepts[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _kept_gram(config: TrainConfig, denoiser: DenoiserLike, rng: random.Random) -> Tensor:
    """Mean of r r^T over states of retain phrases, anchors and the empty prompt, (dim, dim)."""
    singles = split_templates(config.templates).single
    phrases, limit = list(config.retain), config.objective.preserved
    if len(phrases) > limit:
        phrases = rng.sample(phrases, limit)
    forms = (PLAIN_TEMPLATE, singles[0])
    anchors = dict.fromkeys(concept.anchor for concept in config.concepts)
    texts = [fill(form, phrase) for phrase in (*phrases, *anchors) for form in forms]
    gram, count = torch.zeros(()), 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        states = _embed(denoiser, some)
        parts = [
            cross[[max(end - 1, 0), end, *_padding(end, len(cross))]]
            for cross, end in zip(states, _ends(denoiser, some, states), strict=True)
        ]
        r = torch.cat(parts)
        gram, count = gram + r.mT @ r, count + len(r)
    empty = _embed(denoiser, [""])[0]
    return (gram + empty.mT @ empty) / (count + len(empty))


def _twins(config: TrainConfig, concept: ConceptConfig, rng: random.Random) -> Iterator[Twin]:
    """Sentences that ask for a concept, alone and beside something that stays."""
    settings = config.objective
    templates = split_templates(config.templates)
    count = min(settings.sentences, len(templates.single))
    singles = dict.fromkeys((PLAIN_TEMPLATE, *templates.single[:count]))
    for phrase in concept.target:
        for form in singles:
            yield Twin(_side(form, phrase), _side(form, concept.anchor))
        for _ in range(settings.scenes):
            form, other = rng.choice(templates.pair), rng.choice(config.retain)
            before = () if rng.random() < 0.5 else (other,)
            after = () if before else (other,)
            target, anchor = (
                _side(form, *before, own, after=after) for own in (phrase, concept.anchor)
            )
            yield Twin(target, anchor)


def _side(form: str, *phrases: str, after: tuple[str, ...] = ()) -> Side:
    """The template filled; its beginning ends with the last of ``phrases``, and ``after`` is behind it."""
    end = 0
    for _ in phrases:
        end = form.index("{}", end) + len("{}")
    return Side(fill(form, *phrases, *after), fill(form[:end], *phrases))


def _paired_states(denoiser: DenoiserLike, twins: Sequence[Twin]) -> tuple[Tensor, Tensor]:
    """States of the prompts and what they are to be, (states, dim) each: the phrase's last word, all that follows, some padding."""
    sides = [
        _located(denoiser, side)
        for side in ([twin.target for twin in twins], [twin.anchor for twin in twins])
    ]
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (own, word, end), (other, other_word, other_end) in zip(*sides, strict=True):
        following = min(end - word, other_end - other_word)
        for into, states, at, last in zip(
            pairs, (own, other), (word, other_word), (end, other_end), strict=True
        ):
            behind = [last - back for back in range(following - 1)]
            into.append(states[[at, *behind, *_padding(last, len(states))]])
    c, m = (torch.cat(states) for states in pairs)
    return c, m


def _located(denoiser: DenoiserLike, sides: Sequence[Side]) -> list[tuple[Tensor, int, int]]:
    """Of each side its states (length, dim), where its phrase's last word stands, and where the text ends."""
    texts = [side.text for side in sides]
    states = _embed(denoiser, texts)
    ends = _ends(denoiser, texts, states)
    words = _last_words(denoiser, [side.beginning for side in sides], states, ends)
    return list(zip(states, words, ends, strict=True))


def _embed(denoiser: DenoiserLike, texts: Sequence[str]) -> Tensor:
    """States of texts in double precision, (texts, length, dim)."""
    return embed_in_batches(denoiser, texts, TEXTS_AT_ONCE).cross.cpu().double()


def _ends(denoiser: DenoiserLike, texts: Sequence[str], states: Tensor) -> list[int]:
    """Where each text ends: the first state that changes when a word is added, for text encoders read from left to right."""
    longer = _embed(denoiser, [f"{text} and" for text in texts])
    return [_first_difference(a, b) for a, b in zip(states, longer, strict=True)]


def _last_words(
    denoiser: DenoiserLike, beginnings: Sequence[str], states: Tensor, ends: Sequence[int]
) -> list[int]:
    """Where the last word of each beginning stands in the text it begins."""
    begun = _embed(denoiser, beginnings)
    places = []
    for a, b, end in zip(states, begun, ends, strict=True):
        difference = _first_difference(a, b)
        places.append(max(1, min(difference, end) - 1))
    return places


def _first_difference(a: Tensor, b: Tensor) -> int:
    """The first state in which two encodings differ; their last if in none."""
    differs = (a - b).norm(dim=-1) > SAME * a.norm(dim=-1).clamp(min=1e-6)
    return int(differs.int().argmax()) if differs.any() else len(a) - 1


def _padding(end: int, length: int) -> list[int]:
    """Some places behind the end."""
    first = min(end + 1, length - 1)
    return torch.linspace(first, length - 1, PADDING_READ).long().tolist()
