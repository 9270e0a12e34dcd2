"""A CLIP that says what it read: every 77 tokens of every prompt, whichever text model they were meant for.

A conditioning carries at most one pooled vector, that of its first 77 tokens, and on some families not the one a hypernetwork reads.
A tapped CLIP encodes exactly as before, adds CLIP-L's vectors of the whole text to the conditioning, and remembers them by the content
of the encoded states, so that they are found again after nodes have joined or mixed conditionings.

One vector for 77 tokens hardly shows one word of seventy, to which a denoiser attends all the same. So longer texts are also read in
short windows. The vectors of every single token, which gates may read instead, come with the same pass.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .clip_l import READER, final_states, find_reader, has_known_form, listening

if TYPE_CHECKING:
    from comfy.sd import CLIP

VECTORS = "unhype_vectors"
"""Of the vectors (n, 768) in a conditioning entry."""
DIGEST = "unhype_digest"
"""Of the hash of the states that the vectors belong to, in the same place."""
CHUNKS = "unhype_chunks"
"""Of the 77 tokens that each of the vectors belongs to, in the same place."""
TOKENS = "unhype_tokens"
"""Of the vectors of every token (n, 768), the ends among them, in the same place."""
TOKEN_CHUNKS = "unhype_token_chunks"
"""Of the 77 tokens that each of those belongs to, in the same place."""
WINDOWED = "unhype_windowed"
"""Of whether long texts were read in windows too, in the same place."""
WHOLE = -1
"""Among the numbers of the 77 tokens: what belongs to none of CLIP-L's, or to several."""
SKETCH = 1024
SMALLEST_SHARE = 0.05
"""Of what may be left out of a mixture."""
MOST_LEVELS = 6
"""Of weight at which one chunk is read."""
LONG = 16
"""Texts of more tokens are read in windows too; shorter ones are like those that a gate is taught."""
WINDOWS = ((4, 2), (8, 4))
"""Sizes and strides, in tokens, of what is read of longer texts by itself.

The smaller ones hold words of up to 3 tokens with next to nothing beside them, the larger ones names of up to 5. In windows of 8 alone
a word among unrelated nouns fires in about half of the cases, in windows of 4 nearly always (docs/guard.md).
"""
MOST_AT_ONCE = 256
"""Windows that CLIP-L reads in one batch, which bounds the memory that a very long text takes."""

WeightedTokens = list[list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Placed:
    """Vectors of a text, and where they are from.

    Attributes:
        vectors: (n, 768); those of CLIP-L's 77 tokens as they are come first, in their order.
        chunks: the number of the 77 tokens that each vector belongs to, or ``WHOLE``.
    """

    vectors: Tensor
    chunks: tuple[int, ...]

    @staticmethod
    def of(parts: Sequence[tuple[Tensor, int]]) -> Placed:
        """Of vectors (n, 768) and the number of the 77 tokens that they belong to."""
        chunks = tuple(number for part, number in parts for _ in range(len(part)))
        return Placed(torch.cat([part for part, _ in parts]).float().cpu(), chunks)

    def by_chunk(self, number: int) -> tuple[Tensor, ...] | None:
        """The vectors of each of so many times 77 tokens, (n, 768) and its own first; nothing if some can't be assigned."""
        if set(self.chunks) != set(range(number)):
            return None
        places = torch.tensor(self.chunks)
        return tuple(self.vectors[places == chunk] for chunk in range(number))


@dataclass(frozen=True)
class Heard:
    """What was read of a text.

    Attributes:
        ends: the vectors of its parts, each that of the part's end.
        tokens: the vectors of every token, those ends among them, without windows.
        windowed: whether what is long of it was read in windows too.
    """

    ends: Placed
    tokens: Placed
    windowed: bool = True

    @staticmethod
    def told(extras: Mapping[str, Any]) -> Heard:
        """As a conditioning's extras hold it."""
        return Heard(
            Placed(extras[VECTORS], extras[CHUNKS]),
            Placed(extras[TOKENS], extras[TOKEN_CHUNKS]),
            extras[WINDOWED],
        )

    def extras(self) -> dict[str, Any]:
        """As ``told`` reads it."""
        return {
            VECTORS: self.ends.vectors,
            CHUNKS: self.ends.chunks,
            TOKENS: self.tokens.vectors,
            TOKEN_CHUNKS: self.tokens.chunks,
            WINDOWED: self.windowed,
        }


@dataclass(frozen=True)
class Run:
    """Tokens for CLIP-L to read by themselves, without start and end.

    Attributes:
        chunk: the number of the 77 tokens that they are from, or ``WHOLE``.
        window: whether they are a short part of a longer text.
    """

    tokens: tuple[Any, ...]
    chunk: int
    window: bool = False

    def padded(self, tokenizer: Any) -> list[Any]:
        """The tokens as a chunk that a text model reads."""
        padding = [tokenizer.end_token] * (tokenizer.max_length - 1 - len(self.tokens))
        return [tokenizer.start_token, *self.tokens, *padding]

    def windows(self) -> Iterator[Run]:
        """Its parts of the sizes that are read of long texts."""
        for size, stride in WINDOWS:
            last = len(self.tokens) - size
            for start in (*range(0, last, stride), last) if last > 0 else ():
                yield Run(self.tokens[start : start + size], self.chunk, window=True)


class Tap:
    """Stands in for the text models of a CLIP; all it does not do itself, they do.

    Args:
        weights: id of the patches on their weights with which they count as read; others are noticed.
        ledger: where encoded prompts are remembered, if at all.
        windows: whether long texts are read in windows too.
    """

    def __init__(
        self, stage: Any, tokenizer: Any, weights: Any, ledger: Ledger | None, *, windows: bool
    ) -> None:
        self._stage = stage
        self._tokenizer = tokenizer
        self._weights = weights
        self._ledger = ledger
        self.windows = windows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def with_windows(self) -> Tap:
        """The same that reads long texts in windows too."""
        return Tap(self._stage, self._tokenizer, self._weights, self._ledger, windows=True)

    @torch.no_grad()
    def encode_token_weights(self, tokens: Mapping[str, WeightedTokens]) -> tuple[Any, ...]:
        """The host's states and pooled output, with what was read among the extras that go into the conditioning."""
        own, reader = tokens["l"], getattr(self._stage, READER)
        with listening(reader) as said:
            cond, pooled, *extras = self._stage.encode_token_weights(tokens)
        parts = [part for batch in said for part in enumerate(batch.texts()[: len(own)])]
        heard = self._heard([(text, number) for number, text in parts], self._further(tokens))
        told = {**(extras[0] if extras else {}), **heard.extras()}
        # With other weights (a LoRA, an edit of the attention) the reader may see less than the other text models do.
        if self._ledger is not None and self._stage.current_weight_patches_uuid == self._weights:
            told[DIGEST] = digest(cond[0])
            self._ledger.remember(cond, heard)
        return cond, pooled, told

    def _heard(self, own: Sequence[tuple[Tensor, int]], further: Sequence[Run]) -> Heard:
        """What CLIP-L's own texts (tokens, 768) and further runs say."""
        runs = [run for run in further if self.windows or not run.window]
        read = self._read(runs)
        texts = [(read[_ids(run.tokens)], run) for run in runs]
        tokens = [*own, *((text, run.chunk) for text, run in texts if not run.window)]
        ends = [*own, *((text, run.chunk) for text, run in texts)]
        return Heard(
            Placed.of([(text[-1:], chunk) for text, chunk in ends]),
            Placed.of(tokens),
            windowed=len(runs) == len(further),
        )

    def _read(self, runs: Sequence[Run]) -> dict[tuple[Any, ...], Tensor]:
        """CLIP-L's vectors of every run by its tokens, (tokens, 768), of windows the end's alone; each is read once."""
        reader, mine = getattr(self._stage, READER), getattr(self._tokenizer, READER)
        whole = {_ids(run.tokens): run for run in runs if not run.window}
        short = {_ids(run.tokens): run for run in runs if run.window}
        short = {key: run for key, run in short.items() if key not in whole}
        if not has_known_form(reader):
            whole, short = {**whole, **short}, {}
        read: dict[tuple[Any, ...], Tensor] = {}
        if whole:
            chunks = [[(token, 1.0) for token in run.padded(mine)] for run in whole.values()]
            with listening(reader) as said:
                reader.encode_token_weights(chunks)
            read.update(zip(whole, said[0].texts()[: len(whole)], strict=True))
        for size in {len(run.tokens) for run in short.values()}:
            keys = [key for key, run in short.items() if len(run.tokens) == size]
            for start in range(0, len(keys), MOST_AT_ONCE):
                some = keys[start : start + MOST_AT_ONCE]
                rows = [(mine.start_token, *short[key].tokens, mine.end_token) for key in some]
                read.update(zip(some, _ends(reader, rows)[:, None], strict=True))
        return read

    def _further(self, tokens: Mapping[str, WeightedTokens]) -> list[Run]:
        """What a look at the ends of CLIP-L's chunks does not show.

        That is: text behind an end that was typed; the strongest words alone where weights differ; what other text models
        were given and CLIP-L was not; and windows of all that is long.
        """
        mine: Any = getattr(self._tokenizer, READER)
        own = [_ids(chunk) for chunk in tokens["l"]]
        runs: dict[tuple[tuple[Any, ...], int], Run] = {}

        for text in (*_own_texts(tokens["l"], mine), *self._other_texts(tokens)):
            new = [run for run in text if run.chunk != WHOLE or _ids(run.padded(mine)) not in own]
            long = sum(len(run.tokens) for run in new) > LONG
            for part in (part for run in new for part in (run, *(run.windows() if long else ()))):
                key = _ids(part.tokens), part.chunk
                new_here = key not in runs or (runs[key].window and not part.window)
                if new_here and (part.chunk == WHOLE or _ids(part.padded(mine)) != own[part.chunk]):
                    runs[key] = part
        return list(runs.values())

    def _other_texts(self, tokens: Mapping[str, WeightedTokens]) -> Iterator[list[Run]]:
        """What other text models were given, in CLIP-L's tokens: all of it, and again only the words of each higher weight."""
        mine: Any = getattr(self._tokenizer, READER)
        for name, chunks in tokens.items():
            other = getattr(
                self._tokenizer, name if hasattr(self._tokenizer, name) else f"clip_{name}", None
            )
            if name == "l" or other is None:
                continue
            for words in _levels(chunks):
                text = " ".join(_decode(other, chunk) for chunk in words)
                yield [
                    Run(
                        tuple(t for piece in _pieces([t for t, *_ in chunk], mine) for t in piece),
                        WHOLE,
                    )
                    for chunk in mine.tokenize_with_weights(text, disable_weights=True)
                ]


def _own_texts(chunks: WeightedTokens, tokenizer: Any) -> Iterator[list[Run]]:
    """CLIP-L's text between ends: all of it, and again only the words of each higher weight."""
    for words in _levels(chunks):
        yield [
            Run(tuple(piece[: tokenizer.max_length - 2]), number)
            for number, chunk in enumerate(words)
            for piece in _pieces(chunk, tokenizer)
        ]


def _levels(chunks: WeightedTokens) -> list[list[list[Any]]]:
    """The tokens of every chunk, and again only those of at least each higher weight."""
    levels = [_by_weight(chunk) for chunk in chunks]
    return [
        [words[min(level, len(words) - 1)] for words in levels]
        for level in range(max(len(words) for words in levels))
    ]


def tap(clip: CLIP, *, remember: bool = True, windows: bool = True) -> CLIP:
    """A clone of a CLIP that says what it read; one that already does, with no less, is returned as it is.

    Args:
        remember: whether conditionings that it encodes are to count as known.
        windows: whether long texts are read in windows too, for gates that read ends.

    Raises:
        ValueError: it has no CLIP-L.
    """
    stage: Any = clip.cond_stage_model
    if not isinstance(stage, Tap):
        find_reader(clip)
        weights, ledger = clip.patcher.patches_uuid, LEDGER if remember else None
        tapped = Tap(stage, clip.tokenizer, weights, ledger, windows=windows)
    elif windows and not stage.windows:
        tapped = stage.with_windows()
    else:
        return clip
    clip = clip.clone()
    clip.cond_stage_model = tapped  # pyright: ignore[reportAttributeAccessIssue]
    return clip


@dataclass(frozen=True)
class Known:
    """An encoded prompt: what was read of it, and a few of its states' values."""

    length: int
    heard: Heard
    sketch: Tensor


class Ledger:
    """The prompts last encoded by tapped CLIPs, by the content of their states."""

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()

    def remember(self, cond: Tensor, heard: Heard) -> None:
        """Keep what the states (1, tokens, dim) were made from; states that are not finite are not kept."""
        if not torch.isfinite(cond).all():
            return
        key = digest(cond[0])
        before = self._known.get(key)
        if before is not None and before.heard.windowed and _same_text(before.heard, heard):
            heard = before.heard
        self._known[key] = Known(cond.shape[1], heard, _sketch(cond[0]))
        self._known.move_to_end(key)
        while len(self._known) > self.size:
            self._known.popitem(last=False)

    def find(self, cond: Tensor) -> Heard | None:
        """All that the states (1, tokens, dim) were joined or mixed from; nothing if any part is unknown."""
        joined = self._joined(cond[0])
        if joined is not None:
            return _of_all(joined, _one_after_another)
        mixed = self._mixed(cond[0])
        return None if mixed is None else _of_all(mixed, _together)

    def _joined(self, states: Tensor) -> list[Heard] | None:
        """Encoded prompts one after the other, as Conditioning Concat leaves them."""
        lengths = sorted({known.length for known in self._known.values()}, reverse=True)
        parts, start = [], 0
        while start < len(states):
            for length in lengths:
                key = digest(states[start : start + length])
                known = self._known.get(key)
                if known is not None and known.length == length:
                    self._known.move_to_end(key)
                    parts.append(known.heard)
                    start += length
                    break
            else:
                return None
        return parts

    def _mixed(self, states: Tensor) -> list[Heard] | None:
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
        return [same[index].heard for index in sorted(counted)] or None


LEDGER = Ledger()


def _same_text(first: Heard, second: Heard) -> bool:
    """Whether two readings are of one text, be it in windows or not."""
    return torch.equal(first.tokens.vectors, second.tokens.vectors)


def _of_all(parts: Sequence[Heard], put: Callable[[Sequence[Placed]], Placed]) -> Heard:
    """What was read of several texts that ``put`` puts together."""
    return Heard(
        put([heard.ends for heard in parts]),
        put([heard.tokens for heard in parts]),
        windowed=all(heard.windowed for heard in parts),
    )


def _one_after_another(parts: Sequence[Placed]) -> Placed:
    """The vectors of joined texts; their 77 tokens are counted on."""
    chunks: list[int] = []
    start = 0
    for part in parts:
        chunks += [chunk if chunk == WHOLE else start + chunk for chunk in part.chunks]
        start += max(part.chunks) + 1
    return Placed(torch.cat([part.vectors for part in parts]), tuple(chunks))


def _together(parts: Sequence[Placed]) -> Placed:
    """The vectors of mixed texts."""
    return Placed.of([(part.vectors, WHOLE) for part in parts])


def _ends(reader: Any, rows: Sequence[Sequence[Any]]) -> Tensor:
    """CLIP-L's states at the ends of rows of tokens, all as long, (rows, 768)."""
    device = reader.transformer.get_input_embeddings().weight.device
    embeddings = reader.process_tokens([list(row) for row in rows], device)[0]
    return final_states(reader, embeddings)[0][:, -1]


def _ids(tokens: Sequence[Any]) -> tuple[Any, ...]:
    """Ids of tokens, with or without weights; learned embeddings stand for themselves."""
    plain = [token[0] if isinstance(token, tuple) else token for token in tokens]
    return tuple(token if isinstance(token, int) else id(token) for token in plain)


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
