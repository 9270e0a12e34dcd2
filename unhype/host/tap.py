"""A CLIP that says what it read: every 77 tokens of every prompt, whichever text model they were meant for.

A conditioning carries at most one pooled vector, that of its first 77 tokens, and on some families not the one a hypernetwork reads.
A tapped CLIP encodes exactly as before, adds CLIP-L's vectors of the whole text to the conditioning, and remembers them by the content
of the encoded states, so that they are found again after nodes have joined or mixed conditionings.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.sd import CLIP

VECTORS = "unhype_vectors"
"""Of the vectors (n, 768) in a conditioning entry."""
DIGEST = "unhype_digest"
"""Of the hash of the states that the vectors belong to, in the same place."""
READER = "clip_l"
"""The host's name of the text model whose states are read."""
SKETCH = 1024
SMALLEST_SHARE = 0.05
"""Of what may be left out of a mixture."""
MOST_LEVELS = 6
"""Of weight at which one chunk is read."""

WeightedTokens = list[list[tuple[Any, ...]]]


class Tap:
    """Stands in for the text models of a CLIP; all it does not do itself, they do.

    Args:
        weights: id of the patches on their weights with which they count as read; others are noticed.
        ledger: where encoded prompts are remembered, if at all.
    """

    def __init__(self, stage: Any, tokenizer: Any, weights: Any, ledger: Ledger | None) -> None:
        self._stage = stage
        self._tokenizer = tokenizer
        self._weights = weights
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    @torch.no_grad()
    def encode_token_weights(self, tokens: Mapping[str, WeightedTokens]) -> tuple[Any, ...]:
        """The host's states and pooled output, with ``VECTORS`` among the extras that go into the conditioning."""
        reader = getattr(self._stage, READER)
        with _listening(reader.transformer) as heard:
            cond, pooled, *extras = self._stage.encode_token_weights(tokens)
            own = tokens["l"]
            vectors = [states[: len(own)] for states in heard]
            if further := self._further(tokens):
                heard.clear()
                reader.encode_token_weights(further)
                vectors += [states[: len(further)] for states in heard]
        found = torch.cat(vectors).float().cpu()
        told: dict[str, Any] = {**(extras[0] if extras else {}), VECTORS: found}
        # With other weights (a LoRA, an edit of the attention) the reader may see less than the other text models do.
        if self._ledger is not None and self._stage.current_weight_patches_uuid == self._weights:
            told[DIGEST] = digest(cond[0])
            self._ledger.remember(cond, found)
        return cond, pooled, told

    def _further(self, tokens: Mapping[str, WeightedTokens]) -> WeightedTokens:
        """What a look at the ends of CLIP-L's chunks does not show, as chunks of its tokens, each weighing 1.

        That is: text behind an end that was typed; the strongest words alone where weights differ; and what other text
        models were given and CLIP-L was not.
        """
        mine: Any = getattr(self._tokenizer, READER)
        seen = {_ids(chunk) for chunk in tokens["l"]}
        result: WeightedTokens = []

        def add(chunk: list[tuple[Any, ...]]) -> None:
            if _ids(chunk) not in seen:
                seen.add(_ids(chunk))
                result.append(chunk)

        for chunk in tokens["l"]:
            for words in _by_weight(chunk):
                for piece in _pieces(words, mine):
                    inner = piece[: mine.max_length - 2]
                    padding = [mine.end_token] * (mine.max_length - 1 - len(inner))
                    add([(token, 1.0) for token in (mine.start_token, *inner, *padding)])
        for name, chunks in tokens.items():
            other = getattr(
                self._tokenizer, name if hasattr(self._tokenizer, name) else f"clip_{name}", None
            )
            if name == "l" or other is None:
                continue
            levels = [_by_weight(chunk) for chunk in chunks]
            for level in range(max(len(words) for words in levels)):
                text = " ".join(
                    _decode(other, words[min(level, len(words) - 1)]) for words in levels
                )
                for chunk in mine.tokenize_with_weights(text, disable_weights=True):
                    add(chunk)
        return result


def tap(clip: CLIP, *, remember: bool = True) -> CLIP:
    """A clone of a CLIP that says what it read; one that already does is returned as it is.

    Args:
        remember: whether conditionings that it encodes are to count as known.

    Raises:
        ValueError: it has no CLIP-L.
    """
    stage: Any = clip.cond_stage_model
    if isinstance(stage, Tap):
        return clip
    if getattr(stage, READER, None) is None:
        raise ValueError(
            f"The connected CLIP ({type(stage).__name__}) has no CLIP-L, which reads the prompts for the hypernetwork. "
            "Connect the CLIP of a full checkpoint, or load clip_l with the other text encoders."
        )
    clip = clip.clone()
    tapped = Tap(stage, clip.tokenizer, clip.patcher.patches_uuid, LEDGER if remember else None)
    clip.cond_stage_model = tapped  # pyright: ignore[reportAttributeAccessIssue]
    return clip


@dataclass(frozen=True)
class Known:
    """An encoded prompt: its vectors (n, 768), and a few of its states' values."""

    length: int
    vectors: Tensor
    sketch: Tensor


class Ledger:
    """The prompts last encoded by tapped CLIPs, by the content of their states."""

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()

    def remember(self, cond: Tensor, vectors: Tensor) -> None:
        """Keep what the states (1, tokens, dim) were made from; states that are not finite are not kept."""
        if not torch.isfinite(cond).all():
            return
        key = digest(cond[0])
        self._known[key] = Known(cond.shape[1], vectors, _sketch(cond[0]))
        self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)

    def find(self, cond: Tensor) -> Tensor | None:
        """Vectors (n, 768) of all that the states (1, tokens, dim) were joined or mixed from; nothing if any part is unknown."""
        parts = self._joined(cond[0])
        if parts is None:
            parts = self._mixed(cond[0])
        return None if parts is None else torch.cat(parts)

    def _joined(self, states: Tensor) -> list[Tensor] | None:
        """Encoded prompts one after the other, as Conditioning Concat leaves them."""
        lengths = sorted({known.length for known in self._known.values()}, reverse=True)
        parts, start = [], 0
        while start < len(states):
            for length in lengths:
                key = digest(states[start : start + length])
                known = self._known.get(key)
                if known is not None and known.length == length:
                    self._known.move_to_end(key)
                    parts.append(known.vectors)
                    start += length
                    break
            else:
                return None
        return parts

    def _mixed(self, states: Tensor) -> list[Tensor] | None:
        """A weighted sum of encoded prompts, as Conditioning Average leaves it, found by least squares."""
        same = [known for known in self._known.values() if known.length == len(states)]
        if not same:
            return None
        basis = torch.stack([known.sketch for known in same], dim=1)
        sizes, wanted = basis.norm(dim=0).clamp(min=1e-12), _sketch(states)
        try:
            shares = torch.linalg.lstsq(basis / sizes, wanted[:, None], driver="gelsd").solution[
                :, 0
            ]
        except RuntimeError:  # states that are not finite
            return None
        shares = shares / sizes
        if not (basis @ shares - wanted).norm() <= 1e-3 * wanted.norm():
            return None
        # The smallest shares are left out only as long as they are little together.
        order = shares.abs().argsort()
        counted = order[shares.abs()[order].cumsum(0) > SMALLEST_SHARE].tolist()
        return [same[index].vectors for index in sorted(counted)] or None


LEDGER = Ledger()


@contextmanager
def _listening(transformer: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect the unprojected pooled states, (batch, 768), of every call inside the block."""
    heard: list[Tensor] = []
    handle = transformer.register_forward_hook(
        lambda _module, _inputs, output: heard.append(output[3])
    )
    try:
        yield heard
    finally:
        handle.remove()


def _ids(chunk: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Token ids of one chunk; learned embeddings stand for themselves."""
    return tuple(token if isinstance(token, int) else id(token) for token, *_ in chunk)


def _by_weight(chunk: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """The tokens of a chunk, and again only those of at least each higher weight, as text models feel them."""
    levels = sorted({abs(weight) for _, weight, *_ in chunk})
    if len(levels) > MOST_LEVELS:
        levels = [levels[i * (len(levels) - 1) // (MOST_LEVELS - 1)] for i in range(MOST_LEVELS)]
    return [
        [token for token, weight, *_ in chunk if abs(weight) >= level]
        for level in dict.fromkeys(levels)
    ]


def _pieces(tokens: Sequence[Any], tokenizer: Any) -> list[list[Any]]:
    """The runs of tokens between ends; a text model pools at the first end, but the denoiser reads on."""
    pieces: list[list[Any]] = [[]]
    for token in tokens:
        if isinstance(token, int) and token == tokenizer.end_token:
            pieces.append([])
        elif not isinstance(token, int) or token != tokenizer.start_token:
            pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def _decode(tokenizer: Any, tokens: Sequence[Any]) -> str:
    """The text of another text model's tokens, without the end and padding behind it."""
    ids = [token for token in tokens if isinstance(token, int)]
    while ids and ids[-1] in (tokenizer.end_token, tokenizer.pad_token):
        ids.pop()
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=True)


def digest(states: Tensor) -> bytes:
    """Hash of states (tokens, dim)."""
    plain = states.detach().float().cpu().contiguous()
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()


def _sketch(states: Tensor) -> Tensor:
    """Values of (tokens, dim) at places spread over all of it, (SKETCH,)."""
    flat = states.detach().float().flatten()
    places = torch.linspace(0, len(flat) - 1, SKETCH, dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu()
