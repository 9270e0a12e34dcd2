"""Misspellings that people type, by accident or to get around a filter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LEET: Mapping[str, str] = {
    "a": "4",
    "e": "3",
    "g": "9",
    "i": "1",
    "l": "1",
    "o": "0",
    "s": "5",
    "t": "7",
}


def misspellings(word: str, num: int, *, seed: int = 0) -> list[str]:
    """At most ``num`` misspellings of a word or phrase, of every kind in turn, never the word itself.

    Kinds: two letters swapped, one dropped, one doubled, a neighbouring key, digits for letters, a hyphen or space inside.
    """
    rng = random.Random(f"unhype misspellings {seed} {word}")
    kinds = [
        rng.sample(slips := list(dict.fromkeys(kind)), len(slips))
        for kind in (
            _swapped(word),
            _dropped(word),
            _doubled(word),
            _neighbouring(word),
            _leet(word),
            _split(word),
        )
    ]
    longest = max(map(len, kinds))
    mixed = [kind[index] for index in range(longest) for kind in kinds if index < len(kind)]
    plain = word.strip().casefold()
    wrong = [text for text in mixed if text.strip() and text.strip().casefold() != plain]
    return list(dict.fromkeys(wrong))[:num]


def _swapped(word: str) -> Iterator[str]:
    for i, (first, second) in enumerate(zip(word, word[1:], strict=False)):
        if first.isalnum() and second.isalnum():
            yield word[:i] + second + first + word[i + 2 :]


def _dropped(word: str) -> Iterator[str]:
    for i, letter in enumerate(word):
        if letter.isalnum():
            yield word[:i] + word[i + 1 :]


def _doubled(word: str) -> Iterator[str]:
    for i, letter in enumerate(word):
        if letter.isalnum():
            yield word[: i + 1] + word[i:]


def _neighbouring(word: str) -> Iterator[str]:
    for i, letter in enumerate(word):
        for key in _neighbours(letter.lower()):
            yield word[:i] + key + word[i + 1 :]


def _neighbours(key: str) -> Iterator[str]:
    """The keys beside, above and below."""
    for row, keys in enumerate(KEY_ROWS):
        place = keys.find(key)
        if place < 0:
            continue
        for other_row, shifts in ((row - 1, (0, 1)), (row, (-1, 1)), (row + 1, (-1, 0))):
            for shift in shifts:
                if 0 <= other_row < len(KEY_ROWS) and 0 <= place + shift < len(KEY_ROWS[other_row]):
                    yield KEY_ROWS[other_row][place + shift]


def _leet(word: str) -> Iterator[str]:
    yield "".join(LEET.get(letter.lower(), letter) for letter in word)
    for i, letter in enumerate(word):
        if letter.lower() in LEET:
            yield word[:i] + LEET[letter.lower()] + word[i + 1 :]


def _split(word: str) -> Iterator[str]:
    for i in range(1, len(word)):
        if word[i - 1].isalnum() and word[i].isalnum():
            yield from (word[:i] + between + word[i:] for between in "- ")
    for between in "- ":
        yield " ".join(between.join(part) for part in word.split(" "))
