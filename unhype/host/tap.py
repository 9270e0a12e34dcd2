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
READER = "clip_l"
"""The host's name of the text model whose states are read."""
SKETCH = 1024
SMALLEST_SHARE = 0.05
"""Of a prompt in a mixture; one of less is not drawn."""

WeightedTokens = list[list[tuple[Any, ...]]]


class Tap:
    """Stands in for the text models of a CLIP; all it does not do itself, they do."""

    def __init__(self, stage: Any, tokenizer: Any) -> None:
        self._stage = stage
        self._tokenizer = tokenizer

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
            if elsewhere := self._further(tokens):
                heard.clear()
                reader.encode_token_weights(elsewhere)
                vectors += [states[: len(elsewhere)] for states in heard]
        found = torch.cat(vectors).float().cpu()
        LEDGER.remember(cond, found)
        return cond, pooled, {**(extras[0] if extras else {}), VECTORS: found}

    def _further(self, tokens: Mapping[str, WeightedTokens]) -> WeightedTokens:
        """What other text models were given and CLIP-L was not, in CLIP-L's tokens."""
        seen = {_ids(chunk) for chunk in tokens["l"]}
        result = []
        for name, chunks in tokens.items():
            other = getattr(
                self._tokenizer, name if hasattr(self._tokenizer, name) else f"clip_{name}", None
            )
            if name == "l" or other is None:
                continue
            text = " ".join(_decode(other, chunk) for chunk in chunks)
            for chunk in getattr(self._tokenizer, READER).tokenize_with_weights(
                text, disable_weights=True
            ):
                if _ids(chunk) not in seen:
                    seen.add(_ids(chunk))
                    result.append(chunk)
        return result


def tap(clip: CLIP) -> CLIP:
    """A clone of a CLIP that says what it read; one that already does is returned as it is.

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
    clip.cond_stage_model = Tap(stage, clip.tokenizer)  # pyright: ignore[reportAttributeAccessIssue]
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
        """Keep what the states (1, tokens, dim) were made from."""
        key = _digest(cond[0])
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
                known = self._known.get(_digest(states[start : start + length]))
                if known is not None and known.length == length:
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
        wanted = _sketch(states)
        shares = torch.linalg.lstsq(basis, wanted[:, None], driver="gelsd").solution[:, 0]
        if (
            not torch.isfinite(shares).all()
            or (basis @ shares - wanted).norm() > 1e-3 * wanted.norm()
        ):
            return None
        return [
            known.vectors
            for known, share in zip(same, shares, strict=True)
            if abs(share) > SMALLEST_SHARE
        ] or None


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


def _decode(tokenizer: Any, chunk: Sequence[tuple[Any, ...]]) -> str:
    """The text of one chunk of another text model's tokens, up to its end."""
    ids = [token for token, *_ in chunk if isinstance(token, int)]
    if tokenizer.end_token in ids:
        ids = ids[: ids.index(tokenizer.end_token)]
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=True)


def _digest(states: Tensor) -> bytes:
    """Hash of (tokens, dim)."""
    plain = states.detach().float().cpu().contiguous()
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()


def _sketch(states: Tensor) -> Tensor:
    """Values of (tokens, dim) at places spread over all of it, (SKETCH,)."""
    flat = states.detach().float().flatten()
    places = torch.linspace(0, len(flat) - 1, SKETCH, dtype=torch.float64).long()
    return flat[places.to(flat.device)].cpu()
