"""A threshold for a budget: that it is kept, misses least, and is all that changes in the pack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train import calibrate, state
from train.calibrate import CalibrationError, Scores, choose, recalibrate
from train.config import ConfigError, make_config, read_lines
from train.run import train
from unhype import checkpoint
from unhype.checkpoint import Pack

from .conftest import TinyDenoiser, small_data

TWO_CONCEPTS = 'concepts=[{"name": "cat", "target": ["cat", "kitty"], "anchor": "an empty meadow"}, {"name": "car", "target": ["car"], "anchor": "a road"}]'


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack that erases two concepts."""
    data = small_data(tmp_path_factory.mktemp("pack"))
    config = make_config(data, [TWO_CONCEPTS, "gate.steps=200", "train.steps=2"])
    return train(config, denoiser=TinyDenoiser()).path


@pytest.fixture(scope="module")
def pack(path: Path) -> Pack:
    return checkpoint.load(path)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Ordinary ones, some of them near a target's prompts."""
    words = read_lines(calibrate.DATA / "retain.txt")
    ordinary = [f"{word} by the sea" for word in words if word not in {"cat", "car"}]
    return [*ordinary, *(f"a photo of a {word}" for word in ("catt", "scar", "lamp"))]


def scores(silent: list[float], fire: list[float]) -> Scores:
    return Scores(torch.tensor(silent), torch.tensor(fire), torch.zeros(len(fire), dtype=torch.int))


@pytest.mark.parametrize(
    ("budget", "fires", "missed"), [(0, 0, 2), (0.25, 1, 1), (0.6, 2, 0), (1, 4, 0)]
)
def test_of_the_thresholds_within_the_budget_the_one_that_misses_least(
    budget: float, fires: int, missed: int
) -> None:
    found = scores([0.1, 0.3, 0.6, 0.8], [0.5, 0.7, 0.9, 0.95])
    threshold = choose(found, budget)
    assert threshold is not None
    if budget == 1:  # all may fire
        threshold = min(threshold, 0.1)
    assert found.at(threshold).false_fire_rate * 4 == fires
    assert found.at(threshold).miss_rate * 4 == missed


def test_between_two_groups_it_takes_the_middle() -> None:
    assert choose(scores([0.1, 0.2], [0.8, 0.9]), 0) == pytest.approx(0.5)


@pytest.mark.parametrize("fire", [0.5 + 2**-24, 1.0])
def test_it_is_a_probability_even_where_there_is_no_middle(fire: float) -> None:
    found = scores([0.5], [fire])
    threshold = choose(found, 0)
    assert threshold is not None
    assert 0.5 < threshold < 1
    assert found.at(threshold).false_fire_rate == found.at(threshold).miss_rate == 0
    assert choose(scores([1.0], [1.0]), 0) is None


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.2])
def test_the_budget_is_kept_and_a_lower_threshold_would_not_keep_it(
    pack: Pack, denoiser: TinyDenoiser, captions: list[str], budget: float
) -> None:
    found = recalibrate(pack, denoiser.embed_pooled, captions, budget)
    probability = pack.gate.read(denoiser.embed_pooled(captions)).probability.amax(1)
    assert (probability >= found.threshold).float().mean() <= budget
    assert found.calibration.num_negatives == len(captions)
    assert list(found.loudest.values()) == pytest.approx(
        probability.topk(5).values.tolist(), abs=1e-5
    )
    assert found.missed.keys() == {"cat", "car"}
    curve = found.curve
    better = [
        missed
        for fires, missed in zip(curve.false_fire_rate, curve.miss_rate, strict=True)
        if fires <= budget
    ]
    assert found.calibration.miss_rate <= min(better) + 1e-6


def test_the_curve_goes_from_all_to_none(
    pack: Pack, denoiser: TinyDenoiser, captions: list[str]
) -> None:
    found = recalibrate(pack, denoiser.embed_pooled, captions, 0.05)
    curve = found.curve
    assert 30 <= len(curve.threshold) <= calibrate.CURVE_POINTS
    assert found.threshold in curve.threshold
    assert list(curve.threshold) == sorted(curve.threshold)
    assert list(curve.false_fire_rate) == sorted(curve.false_fire_rate, reverse=True)
    assert list(curve.miss_rate) == sorted(curve.miss_rate)
    assert curve.false_fire_rate[0] > 0.9
    assert curve.false_fire_rate[-1] == 0
    assert curve.miss_rate[0] == 0


def test_target_prompts_use_words_that_no_training_saw(pack: Pack) -> None:
    texts, concept = calibrate.target_prompts(pack.info)
    assert concept.count(0) == concept.count(1) == calibrate.POSITIVES
    trained = set(pack.info.training["templates"])
    assert not {text.replace("cat", "{}").replace("kitty", "{}") for text in texts} & trained


def test_only_threshold_and_record_change(
    path: Path, pack: Pack, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    real, link, file = tmp_path / "real.safetensors", tmp_path / "link", tmp_path / "captions.txt"
    real.write_bytes(path.read_bytes())
    link.symlink_to(real)
    file.write_text("# mine\na dog\na bus\na bus\nan old cat\n\na calm morning\n")
    lines = calibrate.read_captions(file, pack.info)
    assert lines.texts == ("a dog", "a bus")
    assert (lines.num_mentioning, lines.num_trained) == (1, 1)
    found = recalibrate(pack, denoiser.embed_pooled, lines.texts, 0.0)
    calibrate.write(link, pack, found, lines, file.name)
    assert link.is_symlink()
    changed = checkpoint.load(link)
    assert changed.info.gate.threshold == found.threshold
    assert changed.info.calibration == found.calibration
    metrics = changed.info.metrics
    assert metrics["gate_calibration"]["captions"] == "captions.txt"
    assert metrics["gate_roc"]["threshold"] == list(found.curve.threshold)
    assert pack.info.metrics.items() <= metrics.items()
    before, after = state.read(path)[0], state.read(real)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_captions_that_fire_like_targets_leave_no_threshold(
    pack: Pack, denoiser: TinyDenoiser
) -> None:
    def embed(texts: list[str]) -> Tensor:
        return denoiser.embed_pooled([text.replace("feline", "cat") for text in texts])

    captions = [f"a feline and a {word}" for word in ("dog", "bus", "tree", "rose", "bee")]
    with pytest.raises(
        CalibrationError, match=r"No threshold .* allow --budget (0\.[2-9]|1).*a feline"
    ):
        recalibrate(pack, embed, [*captions, *(f"{c}, again" for c in captions)], 0.0)


def test_a_file_without_a_caption_to_use(pack: Pack, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a cat\ntwo cars\na long road\n")
    with pytest.raises(
        ConfigError, match="of 3 lines 2 mention an erased phrase and 1 were retained"
    ):
        calibrate.read_captions(file, pack.info)
    with pytest.raises(ConfigError, match=r"--captions: file .* cannot be read"):
        calibrate.read_captions(tmp_path / "absent.txt", pack.info)


def test_a_pack_that_keeps_no_training_config_can_be_calibrated(
    pack: Pack, denoiser: TinyDenoiser
) -> None:
    bare = replace(pack, info=replace(pack.info, training={}))
    assert recalibrate(bare, denoiser.embed_pooled, ["a dog", "a bus"], 0.0).threshold
