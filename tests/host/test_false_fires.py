"""That the benchmark of false fires counts captions it did not calibrate on, and draws what it calls identical."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.false_fires import Draw, drawing, measure
from benchmarks.models import Subject, load_demo
from demo.world.narrow import NarrowWorld
from unhype import checkpoint
from unhype.checkpoint import ConceptInfo, Pack

pytestmark = pytest.mark.host
CAT, BOAT = "a photo of a cat", "a boat on a lake"
LINES = [f"a {word} by the {place}" for word in ("bus", "tree", "rose") for place in "abcdefgh"]


@pytest.fixture(scope="module")
def subject(comfy: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def draw(subject: Subject) -> Draw:
    return drawing(subject)


@pytest.fixture
def pack(make_pack, tmp_path: Path) -> Path:
    """A pack whose gate knows a cat from a boat."""
    made, path = make_pack(fires=(CAT, BOAT), folder=tmp_path), tmp_path / "cat.safetensors"
    concepts = (ConceptInfo("cat", ("cat",), "an empty meadow"),)
    info = replace(made.info, concepts=concepts)
    checkpoint.save(path, info, made.hypernetwork, made.gate)
    return path


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join([*LINES, CAT, "a feline", "word " * 90]), encoding="utf-8")
    return path


def test_what_fires_nothing_is_identical_and_what_fires_is_not(draw: Draw, pack: Path) -> None:
    loaded: Pack = checkpoint.load(pack)
    assert draw(loaded, BOAT, 0)
    assert not draw(loaded, CAT, 0)


def test_captions_are_counted(draw: Draw, pack: Path, captions: Path) -> None:
    settings = {"calibrate_on": 10, "budget": 0.1, "other_names": ["feline"]}
    found = measure(pack, captions, NarrowWorld(), draw, pictures=3, **settings)
    assert (found.concepts, found.calibrated_on, found.counted) == (1, 10, len(LINES) - 10)
    assert found.drawn == found.identical == 3
    assert 0 <= found.before <= 1
    undrawn = measure(pack, captions, NarrowWorld(), None, pictures=3, **settings)
    assert undrawn == replace(found, drawn=0, identical=0)


def test_nothing_left_to_count_is_said(draw: Draw, pack: Path, captions: Path) -> None:
    with pytest.raises(ValueError, match="none is left to count"):
        measure(pack, captions, NarrowWorld(), draw, calibrate_on=99, budget=0.1, pictures=0)
