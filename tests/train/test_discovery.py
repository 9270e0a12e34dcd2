"""The frozen model says which of its words mean a concept, and which look-alikes do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from train.config import TrainConfig
from train.discovery import Discovered, Word, discover, widen
from train.run import train
from unhype import checkpoint
from unhype.host.denoise import TextBatch

from .conftest import TinyDenoiser

ALIAS, LOOK_ALIKE = "feline", "lynx"


class SpeakingDenoiser(TinyDenoiser):
    """Draws a feline as a cat; a lynx is near a cat in text, but drawn as a bus."""

    def words(self) -> list[str]:
        return ["river", ALIAS, "stone", LOOK_ALIKE, "cat", "kitties", "dog", "window", "child"]

    def embed(self, texts: Sequence[str]) -> TextBatch:
        drawn = [text.replace(ALIAS, "cat").replace(LOOK_ALIKE, "bus") for text in texts]
        batch = super().embed(drawn)
        return TextBatch(batch.cross, self.embed_pooled(texts), batch.host_pooled)

    def embed_pooled(self, texts: Sequence[str]) -> Tensor:
        near = [text.replace(ALIAS, "cat").replace(LOOK_ALIKE, "cat") for text in texts]
        return super().embed_pooled(near)


@pytest.fixture
def speaking() -> SpeakingDenoiser:
    return SpeakingDenoiser()


def silent(*_: int) -> None:
    pass


def words(found: Sequence[Discovered]) -> tuple[list[str], list[str]]:
    (concept,) = found
    return [w.text for w in concept.same], [w.text for w in concept.different]


def test_the_models_predictions_decide(
    make: Callable[..., TrainConfig], speaking: SpeakingDenoiser
) -> None:
    config = make("discovery.words=100", "discovery.candidates=2")
    assert words(discover(config, speaking, silent)) == ([ALIAS], [LOOK_ALIKE])


def test_named_and_excluded_words_are_not_looked_at(
    make: Callable[..., TrainConfig], speaking: SpeakingDenoiser
) -> None:
    config = make("discovery.words=100", "discovery.candidates=8", f"discovery.exclude=[{ALIAS}]")
    same, different = words(discover(config, speaking, silent))
    assert not {ALIAS, "cat", "kitties", "dog"} & {*same, *different}


def test_words_for_minors_are_not_looked_at(
    make: Callable[..., TrainConfig], speaking: SpeakingDenoiser
) -> None:
    config = make("discovery.words=100", "discovery.candidates=9", "discovery.different=1e-9")
    same, different = words(discover(config, speaking, silent))
    assert "river" in different
    assert "child" not in {*same, *different}


def test_off_by_default(make: Callable[..., TrainConfig], speaking: SpeakingDenoiser) -> None:
    assert words(discover(make(), speaking, silent)) == ([], [])


def test_a_model_without_words_has_nothing_to_say(
    make: Callable[..., TrainConfig], denoiser: TinyDenoiser
) -> None:
    assert words(discover(make("discovery.words=100"), denoiser, silent)) == ([], [])


def test_found_words_join_targets_and_retained(make: Callable[..., TrainConfig]) -> None:
    found = [Discovered((Word(ALIAS, 0.0),), (Word(LOOK_ALIKE, 1.0), Word("dog", 1.0)))]
    config = widen(make(), found)
    assert config.concepts[0].target == ("cat", "kitty", ALIAS)
    assert config.retain == (*make().retain, LOOK_ALIKE)


def test_the_pack_says_what_was_found(
    make: Callable[..., TrainConfig], speaking: SpeakingDenoiser
) -> None:
    config = make("discovery.words=100", "discovery.candidates=2")
    info = checkpoint.read_info(train(config, denoiser=speaking).path)
    assert info.metrics["discovered"] == {"cat": {"same": [ALIAS], "different": [LOOK_ALIKE]}}
    assert info.concepts[0].target == ("cat", "kitty", ALIAS)
    assert info.training["concepts"][0]["target"] == ["cat", "kitty"]


def test_same_seed_finds_the_same(
    make: Callable[..., TrainConfig], speaking: SpeakingDenoiser
) -> None:
    config = make("discovery.words=100")
    torch.manual_seed(1)
    first = discover(config, speaking, silent)
    torch.manual_seed(2)
    assert discover(config, speaking, silent) == first
