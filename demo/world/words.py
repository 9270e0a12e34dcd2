"""Vocabulary of the world's text encoder, and the words that captions may draw at random."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from unhype.host.locate import find_comfyui

from .captions import ADJECTIVES, Lexicon
from .concepts import STYLES, load_concepts, load_held_out
from .text_encoder import EOS, LENGTH, VOCAB

VOCABULARY_SIZE = 17_000
NEAR_SIMILARITY, NEAR_MARGIN, FAR_SIMILARITY = 0.62, 0.08, 0.35


def tokenizer_folder() -> Path:
    """CLIP's vocabulary, as the host ships it."""
    return find_comfyui() / "comfy" / "sd1_tokenizer"


def known_words(tokenizer_folder: Path) -> dict[str, int]:
    """Whole alphabetic words of CLIP's tokenizer by token id: the most frequent ones, and all the world names."""
    vocab: dict[str, int] = json.loads((tokenizer_folder / "vocab.json").read_text())
    whole = {
        token[:-4]: index for token, index in vocab.items() if re.fullmatch(r"[a-z]+</w>", token)
    }
    held_out = load_held_out()
    phrases = [
        *(phrase for c in load_concepts() for phrase in (c.name, *c.synonyms)),
        *(word for words in held_out.synonyms.values() for word in words),
        *(style.word for style in STYLES),
        *ADJECTIVES,
    ]
    needed = {word for phrase in phrases for word in phrase.split()} & whole.keys()
    frequent = sorted(whole, key=whole.__getitem__)[: VOCABULARY_SIZE - len(needed)]
    return {word: whole[word] for word in sorted({*frequent, *needed}, key=whole.__getitem__)}


def token_rows(words: dict[str, int]) -> Tensor:
    """Row of the word table for every token id, (49408,); 0 is the neutral row."""
    rows = torch.zeros(VOCAB, dtype=torch.long)
    for row, token in enumerate(words.values(), start=1):
        rows[token] = row
    return rows


def _same_stem(first: str, second: str) -> bool:
    """Whether the words differ by an ending: a plural s, or up to three letters from four letters on (kitten, kittens)."""
    short, long = sorted((first, second), key=len)
    if long == f"{short}s":
        return True
    return len(short) >= 4 and len(long) - len(short) <= 3 and long.startswith(short)


@cache
def held_out_words() -> tuple[frozenset[str], frozenset[str]]:
    """The held-out synonyms, and the words that only held-out templates use."""
    held_out = load_held_out()
    synonyms = frozenset(word for group in held_out.synonyms.values() for word in group)
    return synonyms, frozenset(
        {"favourite", "favorite", "masterpiece", "quality", "best", "tiny", "snow"}
    )


def touches_held_out(text: str) -> bool:
    """Whether a word is held out, or is an inflection of a held-out synonym."""
    synonyms, template_words = held_out_words()
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in synonyms or word in template_words:
            return True
        if any(_same_stem(word, held) for held in synonyms):
            return True
    return False


def make_lexicon(words: Sequence[str], embeddings: Tensor, concept_embeddings: Tensor) -> Lexicon:
    """Words the teacher finds clearly closest to one concept, and words far from all; none near a held-out word.

    Args:
        words: vocabulary.
        embeddings: unit-length teacher embeddings of the words, (words, dim).
        concept_embeddings: the same of the concept names, (concepts, dim).
    """
    names = {
        word for c in load_concepts() for phrase in (c.name, *c.synonyms) for word in phrase.split()
    }
    styles = {style.word for style in STYLES}
    similarity = embeddings @ concept_embeddings.T
    best = similarity.topk(2, dim=-1)
    near: dict[int, list[str]] = {}
    filler = []
    for word, top, which in zip(words, best.values.tolist(), best.indices.tolist(), strict=True):
        if len(word) < 3 or word in names or word in styles or touches_held_out(word):
            continue
        if top[0] > NEAR_SIMILARITY and top[0] - top[1] > NEAR_MARGIN:
            near.setdefault(which[0], []).append(word)
        elif top[0] < FAR_SIMILARITY:
            filler.append(word)
    return Lexicon({concept: tuple(group[:8]) for concept, group in near.items()}, tuple(filler))


class Tokenizer:
    """CLIP's tokenizer from a folder with ``vocab.json`` and ``merges.txt``, padded with end-of-text as SD1 does."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTokenizer

        self.inner = CLIPTokenizer.from_pretrained(folder)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, (texts, 77)."""
        encoded = self.inner(list(texts), padding="max_length", truncation=True, max_length=LENGTH)
        ids = torch.tensor(encoded["input_ids"])
        end = (ids == 49407).int().argmax(-1, keepdim=True)
        return torch.where(torch.arange(LENGTH) > end, 49407, ids)

    def spell(self, ids: Tensor) -> list[str]:
        """The text of each row of token ids (texts, tokens), up to its end."""
        rows = [row[: row.index(EOS)] if EOS in row else row for row in ids.tolist()]
        return [self.inner.decode(row, skip_special_tokens=True) for row in rows]
