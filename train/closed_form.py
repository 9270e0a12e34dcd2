"""Edits in closed form: what the text's states become, one edit a concept, without any picture.

Where a denoiser reads the text through linear maps of its states alone, a change of these maps is a change of the states. As in
unified concept editing (UCE, arXiv:2308.14761), the best one is a least-squares problem. Here every concept has its own, of low rank,
which a gate switches; states are paired word by word, and the other words of a prompt are told to become what they are beside
the anchor. What the model draws for states near the anchor's need not be the anchor: ``objectives.refinement`` goes on from here.
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
BARE_TEMPLATE = "{}"
MAIN = 64
"""Directions kept of an edit before those of all concepts are chosen."""
TEXTS_AT_ONCE = 64
UNSEEN = 1e-9
"""Share of the most that the layers see in any direction, up to which one counts as unseen."""
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
) -> Tensor:
    """Write every concept's edit into the hypernetwork, and teach it which concept a prompt asks for.

    For states c_i of concept k, states m_i of its anchor in the same sentences, and states r_j of what stays, the edit E_k is the
    minimum of

        mean |c_i + E c_i - (m_i - gamma (c_i - m_i))|^2 + lambda_r mean |E r_j|^2 + lambda |E|^2,

    of which the hypernetwork keeps the ``rank`` directions that matter most to what the layers make of the c_i.

    Returns:
        Mean of r r^T, (dim, dim).
    """
    seen, kept = Seen.of(denoiser.target_weights()), kept_gram(config, denoiser)
    factorize(hypernetwork, solve_edits(config, denoiser, seen, kept, tick), seen)
    tell_apart(hypernetwork, material, config.seed)
    return kept


def texts_to_read(config: TrainConfig) -> int:
    """How many prompts solving for all edits encodes."""
    rng = random.Random(0)
    kept, forms, count = _kept_texts(config), _forms(config, rng), 0
    for concept in config.concepts:
        twins = list(_twins(config, concept, forms, rng))
        count += len({t.target.text for t in twins}) + len({t.anchor.text for t in twins})
    return len(set(kept)) + count


@dataclass(frozen=True)
class Seen:
    """What all layers together see of a state.

    Attributes:
        weights: of the layers, (out, dim) each.
        into: from states to coordinates in which distances are those between all that the layers make of them, (dim, seen).
        back: from these coordinates to the layers' inputs, (dim, seen).
    """

    weights: tuple[Tensor, ...]
    into: Tensor
    back: Tensor

    @staticmethod
    def of(weights: Sequence[Tensor]) -> Seen:
        """Of layers with these weights."""
        width = weights[0].shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64)
        for weight in weights:
            exact = weight.cpu().double()
            gram += exact.mT @ exact
        values, vectors = torch.linalg.eigh(gram)
        used = values > UNSEEN * values.max()
        sizes = values[used].sqrt()
        return Seen(tuple(weights), vectors[:, used] * sizes, vectors[:, used] / sizes)


@dataclass(frozen=True)
class Edit:
    """A concept's edit E, as far as it moves what the layers see of the concept's states.

    Attributes:
        main: directions in which it moves that most, (seen, main).
        sizes: mean squared movement along each, (main,).
        reads: how far it moves a state along each, (dim, main).
    """

    main: Tensor
    sizes: Tensor
    reads: Tensor

    @staticmethod
    def of(matrix: Tensor, states: Tensor, seen: Seen) -> Edit:
        """Of E (dim, dim), by which a state c becomes c + c E, and the concept's states (states, dim)."""
        moved = states @ matrix @ seen.into
        values, vectors = torch.linalg.eigh(moved.mT @ moved / len(moved))
        main = vectors[:, -MAIN:]
        return Edit(main, values[-MAIN:].clamp(min=0), matrix @ seen.into @ main)


@torch.no_grad()
def solve_edits(
    config: TrainConfig, denoiser: DenoiserLike, seen: Seen, kept: Tensor, tick: Tick
) -> list[Edit]:
    """The edit of every concept; ``kept`` is the mean of r r^T, (dim, dim)."""
    settings, rng = config.objective, random.Random(f"unhype edits {config.seed}")
    texts, gram = _Texts(denoiser), settings.preserve * kept
    forms = _forms(config, rng)
    edits = []
    for index, concept in enumerate(config.concepts):
        c, m = _paired_states(texts, list(_twins(config, concept, forms, rng)))
        wanted = (1 + settings.negative_guidance) * (m - c)
        own = gram + c.mT @ c / len(c)
        own += settings.identity * (m - c).square().mean() * torch.eye(len(own)).to(own)
        matrix = torch.linalg.solve(own, c.mT @ wanted / len(c))
        edits.append(Edit.of(matrix, c, seen))
        tick(index + 1, len(config.concepts))
    return edits


@torch.no_grad()
def factorize(hypernetwork: EditsHypernetwork, edits: Sequence[Edit], seen: Seen) -> None:
    """Write edits into ``up``, ``mix`` and ``down``, keeping what moves the concepts' states most."""
    spread = sum((e.main * e.sizes @ e.main.mT for e in edits), torch.zeros(()))
    directions = _most(spread, hypernetwork.config.directions)  # (seen, directions)
    hypernetwork.mix.zero_()
    hypernetwork.down.zero_()
    for index, edit in enumerate(edits):
        overlap = edit.main.mT @ directions  # (main, directions)
        mix = _most((overlap.mT * edit.sizes) @ overlap, hypernetwork.config.rank)
        down = (edit.reads @ overlap @ mix).mT  # (rank, dim)
        hypernetwork.mix[index, : mix.shape[0], : mix.shape[1]] = mix.to(hypernetwork.mix)
        hypernetwork.down[index, : len(down)] = down.to(hypernetwork.down)
    back = seen.back @ directions
    for up, weight in zip(hypernetwork.up, seen.weights, strict=True):
        up.zero_()
        up[:, : directions.shape[1]] = (weight.cpu().double() @ back).to(up)


def _most(spread: Tensor, count: int) -> Tensor:
    """The directions in which a symmetric matrix (n, n) is largest, (n, count) or fewer."""
    return torch.linalg.eigh(spread)[1].flip(1)[:, :count]


def tell_apart(
    hypernetwork: EditsHypernetwork, material: GateMaterial, seed: int, *, steps: int = STEPS
) -> None:
    """Train the shares of the concepts, if there are several, on noisy embeddings of prompts that ask for one."""
    if hypernetwork.config.num_concepts == 1:
        return
    device = hypernetwork.down.device
    generator = torch.Generator().manual_seed(seed)
    embeddings = hypernetwork.standardize(material.positives.to(device))
    optimizer = torch.optim.AdamW(
        hypernetwork.trunk.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(embeddings), (BATCH_SIZE,), generator=generator)
            x = embeddings[chosen.to(device)]
            x = x + torch.randn(x.shape, generator=generator).to(x)
            loss = F.cross_entropy(hypernetwork.shares(x), material.concepts[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _kept_texts(config: TrainConfig) -> list[str]:
    """Retain phrases and anchors, each in two sentences that end with it."""
    phrases, limit = list(config.retain), config.objective.preserved
    if len(phrases) > limit:
        phrases = random.Random(f"unhype preserved {config.seed}").sample(phrases, limit)
    anchors = dict.fromkeys(concept.anchor for concept in config.concepts)
    forms = (PLAIN_TEMPLATE, BARE_TEMPLATE)
    return [fill(form, phrase) for phrase in (*phrases, *anchors) for form in forms]


@torch.no_grad()
def kept_gram(config: TrainConfig, denoiser: DenoiserLike) -> Tensor:
    """Mean of r r^T over states r of what stays and of the empty prompt, (dim, dim)."""
    texts, sentences = _Texts(denoiser), _kept_texts(config)
    empty = texts.embed([""])[0]
    gram, count = empty.mT @ empty, len(empty)
    for start in range(0, len(sentences), TEXTS_AT_ONCE):
        r = texts.last_states(sentences[start : start + TEXTS_AT_ONCE])
        gram, count = gram + r.mT @ r, count + len(r)
    return gram / count


def _forms(config: TrainConfig, rng: random.Random) -> tuple[str, ...]:
    """Templates with one slot, the plainest among them."""
    templates = split_templates(config.templates).single
    chosen = rng.sample(templates, min(config.objective.sentences, len(templates)))
    return tuple(dict.fromkeys((PLAIN_TEMPLATE, *chosen)))


def _twins(
    config: TrainConfig, concept: ConceptConfig, forms: Sequence[str], rng: random.Random
) -> Iterator[Twin]:
    """Sentences that ask for a concept, alone and beside something that stays."""
    pairs = split_templates(config.templates).pair
    for phrase in concept.target:
        for form in forms:
            yield Twin(_side(form, phrase), _side(form, concept.anchor))
        for _ in range(config.objective.scenes if pairs else 0):
            form, other = rng.choice(pairs), rng.choice(config.retain)
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


def _paired_states(texts: _Texts, twins: Sequence[Twin]) -> tuple[Tensor, Tensor]:
    """States of the prompts and what they are to be, (states, dim) each: the phrase's last word, all that follows, some padding."""
    sides = [
        texts.locate(side)
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


class _Texts:
    """Reads texts, and finds words in them."""

    def __init__(self, denoiser: DenoiserLike) -> None:
        self._denoiser = denoiser

    def embed(self, texts: Sequence[str]) -> Tensor:
        """States in double precision, (texts, length, dim)."""
        return embed_in_batches(self._denoiser, texts, TEXTS_AT_ONCE).cross.cpu().double()

    def last_states(self, texts: Sequence[str]) -> Tensor:
        """States of each text's last word, of its end and of some padding, (states, dim)."""
        parts = []
        for states, ids in zip(self.embed(texts), self._denoiser.token_ids(texts), strict=True):
            end = len(ids) - 1
            parts.append(states[[max(end - 1, 0), end, *_padding(end, len(states))]])
        return torch.cat(parts)

    def locate(self, sides: Sequence[Side]) -> list[tuple[Tensor, int, int]]:
        """Of each side its states (length, dim), where its phrase's last word stands, and where the text ends."""
        ids = self._denoiser.token_ids([side.text for side in sides])
        begun = self._denoiser.token_ids([side.beginning for side in sides])
        states = self.embed([side.text for side in sides])
        return [
            (own, max(1, _shared(a, b) - 1), len(a) - 1)
            for own, a, b in zip(states, ids, begun, strict=True)
        ]


def _shared(text: Sequence[int], beginning: Sequence[int]) -> int:
    """How many tokens both begin with, the end of neither counted."""
    pairs = zip(text[:-1], beginning[:-1], strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(beginning) - 1)


def _padding(end: int, length: int) -> list[int]:
    """Some places behind the end."""
    first = min(end + 1, length - 1)
    return torch.linspace(first, length - 1, PADDING_READ).long().tolist()
