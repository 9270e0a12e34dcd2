"""A checkpoint's own text encoders, for many short prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..embedding import cat_prompts, last_heard, until_end
from .clip_l import READER, final_states, find_reader, has_known_form, listening

if TYPE_CHECKING:
    from comfy.sd import CLIP

POOLED_BATCH = 64
WORD_END = "</w>"
"""How a token that ends a word is written in the vocabulary."""


@dataclass(frozen=True)
class TextBatch:
    """Encoded prompts.

    Attributes:
        cross: the states that the model attends to, (batch, tokens, dim)
        pooled: the vectors that the hypernetwork reads, (batch, embedding_dim)
        host_pooled: the vectors that the host gives the model beside the states, (batch, width)
        heard: what a hypernetwork's gate may read of every token, (batch, tokens, embedding_dim), ``pooled`` the last that is
            not zero; none where it was left out to save memory
    """

    cross: Tensor
    pooled: Tensor
    host_pooled: Tensor
    heard: Tensor | None = None

    def __len__(self) -> int:
        return len(self.cross)

    def rows(self, index: Tensor | Sequence[int]) -> TextBatch:
        """Some of the prompts, in the order of ``index``."""
        index = torch.as_tensor(index, device=self.cross.device)
        return self._each(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> TextBatch:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(batches: Sequence[TextBatch]) -> TextBatch:
        """The prompts of several batches, one after the other."""
        return TextBatch(
            torch.cat([batch.cross for batch in batches]),
            torch.cat([batch.pooled for batch in batches]),
            torch.cat([batch.host_pooled for batch in batches]),
            None
            if any(batch.heard is None for batch in batches)
            else cat_prompts([batch.heard for batch in batches if batch.heard is not None]),
        )

    @property
    def read(self) -> Tensor:
        """What an eraser reads: of every token if that is known, (batch, tokens, embedding_dim), else ``pooled``."""
        return self.pooled if self.heard is None else self.heard

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextBatch:
        heard = None if self.heard is None else change(self.heard)
        return TextBatch(change(self.cross), change(self.pooled), change(self.host_pooled), heard)


@dataclass(frozen=True)
class Tokens:
    """Tokenized prompts, and the vector of each token by itself.

    Attributes:
        ids: (batch, tokens) of int64
        embeddings: rows of the vocabulary, (batch, tokens, dim)
        ends: place of the token that ends the text, (batch,) of int64
    """

    ids: Tensor
    embeddings: Tensor
    ends: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        tokens: what each text encoder gets: chunks of tokens with their weights.
        ids: what the one that the hypernetwork reads gets.
        plain: whether all tokens weigh the same.
    """

    tokens: Mapping[str, list[list[tuple[int, float]]]]
    ids: list[int]
    plain: bool


class TextEncoder:
    """The host's CLIP, with one text encoder or several, of which the hypernetwork reads CLIP-L.

    Raises:
        ValueError: there is no CLIP-L.
    """

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self.stage: Any = clip.cond_stage_model
        self.reader: Any = find_reader(clip)
        self.end: int = self.reader.special_tokens["end"]
        self._longest = {name: len(chunks[0]) for name, chunks in clip.tokenize("").items()}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> TextBatch:
        """Encode prompts as the host's own node does.

        Raises:
            ValueError: a prompt is too long.
        """
        prompts = self._tokenize(texts)
        self._ready()
        ends = torch.tensor([prompt.ids.index(self.end) for prompt in prompts])
        if self._reads_alone() and all(prompt.plain for prompt in prompts):
            with listening(self.reader) as said:
                cross, pooled = self.reader.encode([prompt.ids for prompt in prompts])[:2]
            return TextBatch(cross, pooled, pooled, until_end(said[0].states.float(), ends))
        cross, pooled, host_pooled, spoken = [], [], [], []
        for prompt in prompts:
            with listening(self.reader) as said:
                states, vector, *_ = self.stage.encode_token_weights(prompt.tokens)
            cross.append(states)
            pooled.append(said[0].pooled[:1].float())
            host_pooled.append(vector)
            spoken.append(said[0].states[:1].float())
        heard = until_end(torch.cat(spoken), ends)
        batch = TextBatch(torch.cat(cross), torch.cat(pooled), torch.cat(host_pooled), heard)
        return batch.to(self.clip.patcher.load_device)

    @torch.no_grad()
    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        """Only the pooled vectors of ``embed``, (texts, embedding_dim), much faster for short prompts.

        CLIP is causal, so what follows the end of the text never reaches its state: short prompts run at their own length.

        Raises:
            ValueError: there is no prompt, or one is too long.
        """
        return last_heard(self.embed_tokens(texts))

    @torch.no_grad()
    def embed_tokens(self, texts: Sequence[str]) -> Tensor:
        """Only what ``embed`` says of every token, (texts, tokens, embedding_dim), as fast.

        Raises:
            ValueError: there is no prompt, or one is too long.
        """
        if not texts:
            raise ValueError("There is no text to encode; give at least one.")
        prompts = self._tokenize(texts)
        self._ready()
        if not has_known_form(self.reader):
            parts = [
                self.embed(texts[start : start + POOLED_BATCH]).read
                for start in range(0, len(texts), POOLED_BATCH)
            ]
            return cat_prompts(parts)
        lengths = [prompt.ids.index(self.end) + 1 for prompt in prompts]
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        parts = []
        for start in range(0, len(order), POOLED_BATCH):
            chosen = order[start : start + POOLED_BATCH]
            longest = lengths[chosen[-1]]
            tokens = torch.tensor([prompts[index].ids[:longest] for index in chosen])
            ends = torch.tensor([lengths[index] - 1 for index in chosen])
            parts.append(until_end(self._run(tokens), ends))
        return cat_prompts(parts)[torch.tensor(order).argsort()]

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens that CLIP-L gets of prompts, each up to the one that ends the text.

        Raises:
            ValueError: a prompt is too long.
        """
        every = [prompt.ids for prompt in self._tokenize(texts)]
        return [ids[: ids.index(self.end) + 1] for ids in every]

    @torch.no_grad()
    def token_embeddings(self, texts: Sequence[str]) -> Tokens:
        """Tokens of prompts, for ``encode_embeddings``.

        Raises:
            ValueError: CLIP-L is not the only text encoder, a prompt is too long, or words in it weigh differently.
        """
        self._check_alone()
        prompts = self._tokenize(texts)
        weighted = next((t for t, p in zip(texts, prompts, strict=True) if not p.plain), None)
        if weighted is not None:
            raise ValueError(
                f"Token embeddings carry no weights, but {weighted[:60]!r} has some. Leave the brackets out."
            )
        self._ready()
        embedding = self._token_embedding()
        ids = torch.tensor([prompt.ids for prompt in prompts], device=embedding.weight.device)
        ends = (ids == self.end).int().argmax(1)
        return Tokens(ids, embedding(ids, out_dtype=torch.float32), ends)

    def encode_embeddings(self, embeddings: Tensor, ends: Tensor) -> TextBatch:
        """What ``embed`` makes of prompts, from their tokens' embeddings and differentiable in them.

        Args:
            embeddings: (batch, tokens, dim); CLIP is causal, so fewer tokens than a whole prompt's give the states of those.
            ends: whose states are pooled, (batch,).

        Raises:
            ValueError: CLIP-L is not the only text encoder.
        """
        self._check_alone()
        self._ready()
        device = self._token_embedding().weight.device
        embeddings = embeddings.to(device)
        layer = None if self.reader.layer == "last" else self.reader.layer_idx
        last, inner = final_states(self.reader, embeddings, layer)
        pooled = last[torch.arange(len(last), device=device), ends.to(device)]
        return TextBatch(last if inner is None else inner, pooled, pooled, until_end(last, ends))

    @torch.no_grad()
    def vocabulary(self) -> Tensor:
        """The embedding of every token, (tokens, dim)."""
        self._ready()
        return self._token_embedding().weight.detach().float()

    def words(self) -> list[str]:
        """Whole words of CLIP-L's vocabulary, the most frequent ones first."""
        vocabulary: dict[str, int] = getattr(self.clip.tokenizer, READER).tokenizer.get_vocab()
        whole = {
            token.removesuffix(WORD_END): number
            for token, number in vocabulary.items()
            if token.endswith(WORD_END)
        }
        plain = (word for word in whole if word.isalpha() and word.isascii() and len(word) > 2)
        return sorted(plain, key=whole.__getitem__)

    def spell(self, ids: Tensor) -> list[str]:
        """The text of each row of token ids (batch, tokens), up to its end."""
        tokenizer: Any = getattr(self.clip.tokenizer, READER).tokenizer
        rows = [row[: row.index(self.end)] if self.end in row else row for row in ids.tolist()]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def _run(self, tokens: Tensor) -> Tensor:
        """Final states (batch, length, dim) of tokens (batch, length)."""
        embedding = self._token_embedding()
        device = embedding.weight.device
        embeddings = embedding(tokens.to(device), out_dtype=torch.float32)
        return final_states(self.reader, embeddings)[0]

    def _token_embedding(self) -> Any:
        return self.reader.transformer.text_model.embeddings.token_embedding

    def _check_alone(self) -> None:
        """Refuse models that read a prompt with more than CLIP-L: its token embeddings are not all of the prompt."""
        if not (self._reads_alone() and has_known_form(self.reader)):
            raise ValueError(
                f"This model reads prompts with the text encoders {', '.join(self._longest)}; prompts can be encoded from "
                "token embeddings only where CLIP-L is the only one. Give a Stable Diffusion 1.x checkpoint."
            )

    def _reads_alone(self) -> bool:
        """Whether CLIP-L is the only text encoder, and pools what the hypernetwork reads."""
        only = getattr(self.stage, "clip", None) == READER
        return only and not self.reader.return_projected_pooled

    def _tokenize(self, texts: Sequence[str]) -> list[Prompt]:
        prompts = []
        for text in texts:
            tokens = self.clip.tokenize(text)
            for name, chunks in tokens.items():
                encoder = getattr(self.stage, f"clip_{name}", None) or getattr(
                    self.stage, name, None
                )
                longest = self._longest[name]
                if encoder is not None and (len(chunks) > 1 or len(chunks[0]) > longest):
                    raise ValueError(
                        f"A prompt is longer than the {longest} tokens that training reads of one "
                        f"(text encoder {name}): {text[:60]!r}... Shorten it, or split it in two."
                    )
            (chunk,) = tokens["l"]
            plain = all(weight == 1.0 for _, weight in chunk)
            prompts.append(Prompt(tokens, [int(token) for token, _ in chunk], plain))
        return prompts

    def _ready(self) -> None:
        self.stage.reset_clip_options()
        self.clip.load_model()
