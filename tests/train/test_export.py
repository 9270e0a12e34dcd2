"""Exported LoRA, against what the pack writes when it is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train import state
from train.config import ConfigError, make_config
from train.export import KEY, NothingFiresError, export
from train.run import train
from unhype import checkpoint
from unhype.checkpoint import Pack
from unhype.lora import Spelling, read_state_dict

from .conftest import TinyDenoiser, small_data


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    data = small_data(tmp_path_factory.mktemp("pack"))
    config = make_config(data, ["gate.steps=200", "license=CC0-1.0"])
    return checkpoint.load(train(config, denoiser=TinyDenoiser()).path)


@pytest.mark.parametrize("spelling", Spelling)
def test_the_file_holds_what_the_pack_writes(
    pack: Pack, denoiser: TinyDenoiser, tmp_path: Path, spelling: Spelling
) -> None:
    path, prompt = tmp_path / "new" / "cat.safetensors", "a photo of a cat"
    embedding = denoiser.embed_pooled([prompt])
    written = export(pack, prompt, embedding, path, spelling, force=False)
    assert written.reading.open.item()
    tensors, metadata = state.read(path)
    found = read_state_dict(tensors, pack.info.targets, spelling)
    wanted = pack.generate(embedding).factors
    assert wanted.squared_norm().item() > 0
    for index in range(len(pack.info.targets)):
        torch.testing.assert_close(found.delta(index), wanted.delta(index))
    about = json.loads(metadata[KEY])
    assert about["prompt"] == prompt
    assert about["fired"] == ["cat"]
    assert not about["forced"]
    assert about["base"] == "tiny"
    assert metadata["modelspec.license"] == "CC0-1.0"
    with pytest.raises(checkpoint.CheckpointError, match="is not an UnHype pack"):
        checkpoint.read_info(path)


def test_the_file_holds_all_of_what_a_graded_pack_writes_in_part(
    pack: Pack, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    path, embedding = tmp_path / "cat.safetensors", denoiser.embed_pooled(["a photo of a cat"])
    config = pack.gate.config
    pack.gate.config = replace(config, least_strength=0.1, full_strength_at=0.9999)
    try:
        export(pack, "a photo of a cat", embedding, path, Spelling.HOST, force=False)
        part = pack.generate(embedding).factors.squared_norm().item()
    finally:
        pack.gate.config = config
    found = read_state_dict(state.read(path)[0], pack.info.targets)
    wanted = pack.generate(embedding).factors
    torch.testing.assert_close(found.squared_norm(), wanted.squared_norm())
    assert part < 0.99 * wanted.squared_norm().item()


def test_a_prompt_that_asks_for_nothing_is_refused_unless_forced(
    pack: Pack, denoiser: TinyDenoiser, tmp_path: Path
) -> None:
    path, prompt = tmp_path / "bus.safetensors", "a photo of a bus"
    embedding = denoiser.embed_pooled([prompt])
    with pytest.raises(NothingFiresError, match=r"asks for nothing .* \(nearest: cat at 0\.\d\d"):
        export(pack, prompt, embedding, path, Spelling.HOST, force=False)
    assert not path.exists()
    export(pack, prompt, embedding, path, Spelling.HOST, force=True)
    tensors, metadata = state.read(path)
    found = read_state_dict(tensors, pack.info.targets)
    wanted = pack.hypernetwork.generate(embedding)
    torch.testing.assert_close(found.squared_norm(), wanted.squared_norm())
    assert json.loads(metadata[KEY])["forced"]


def test_only_safetensors_are_written(pack: Pack, denoiser: TinyDenoiser, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ending in \.safetensors"):
        export(
            pack,
            "a cat",
            denoiser.embed_pooled(["a cat"]),
            tmp_path / "cat.pt",
            Spelling.HOST,
            force=False,
        )
