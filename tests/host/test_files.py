"""Models whose parts come in files of their own, loaded by ComfyUI's own loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unhype.host.denoise import CheckpointRefusedError, Denoiser, ModelFiles

from .tiny import write_parts

PREFIXES = {
    "model": "model.diffusion_model.",
    "clip": "cond_stage_model.transformer.",
    "vae": "first_stage_model.",
}


@pytest.fixture(scope="module")
def parts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo world in three files, as Flux and SD3 are often published."""
    folder, paths = tmp_path_factory.mktemp("parts"), {}
    with safe_open(checkpoint, "pt") as file:
        for name, prefix in PREFIXES.items():
            own = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            state = {key.removeprefix(prefix): file.get_tensor(key) for key in own}
            paths[name] = folder / f"world-{name}.safetensors"
            save_file(state, paths[name])
    return paths


Refuse = Callable[..., None]


@pytest.fixture
def refuse(comfy: Path) -> Refuse:
    """Expect that files are refused."""

    def load(files: ModelFiles, match: str, *, pictures: bool = False) -> None:
        with pytest.raises(CheckpointRefusedError, match=match):
            Denoiser.load(files, comfy, pictures=pictures)

    return load


def test_a_model_in_parts_is_the_same_model(
    comfy: Path, checkpoint: Path, parts: dict[str, Path]
) -> None:
    files = ModelFiles(parts["model"], (parts["clip"],), parts["vae"])
    split = Denoiser.load(files, comfy, pictures=True)
    whole = Denoiser.load(ModelFiles(checkpoint), comfy, pictures=True)
    assert split.fingerprint.digest == whole.fingerprint.digest
    assert split.fingerprint.name == "world-model.safetensors"
    pictures = []
    for model in (split, whole):
        text = model.embed(["a cat", "a bus in the rain"])
        noise = model.noise([1, 2], 64)
        latents = model.sample(text, None, steps=2, guidance_scale=3.0, noise=noise)
        pictures.append(model.decode(latents))
    assert torch.equal(*pictures)


def test_a_text_encoder_of_its_own_replaces_the_checkpoints(
    comfy: Path, checkpoint: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    with safe_open(parts["clip"], "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    name = next(key for key in state if key.endswith("final_layer_norm.bias"))
    save_file({**state, name: state[name] + 1}, tmp_path / "other.safetensors")
    other = Denoiser.load(ModelFiles(checkpoint, (tmp_path / "other.safetensors",)), comfy)
    own = Denoiser.load(ModelFiles(checkpoint), comfy)
    moved = other.embed_pooled(["a cat"]) - own.embed_pooled(["a cat"])
    torch.testing.assert_close(moved, torch.ones_like(moved), atol=1e-3, rtol=0)


def test_what_no_file_holds_is_asked_for(refuse: Refuse, parts: dict[str, Path]) -> None:
    refuse(ModelFiles(parts["model"]), "no text encoder.*--text-encoder the file of clip_l,")
    refuse(
        ModelFiles(parts["model"], (parts["clip"],)),
        "no VAE.*`vae` in a config, --vae",
        pictures=True,
    )


def test_files_of_something_else_are_refused(refuse: Refuse, parts: dict[str, Path]) -> None:
    model, clip, vae = (parts[name] for name in PREFIXES)
    refuse(ModelFiles(clip, (clip,)), "world-clip.safetensors holds no diffusion model")
    refuse(ModelFiles(model, (vae,)), "world-vae.safetensors: these are not the text encoders")
    refuse(ModelFiles(model, (clip, clip)), "not the text encoders of Stable Diffusion 1.x")
    refuse(ModelFiles(model, (clip,) * 4), "not the text encoders")
    refuse(ModelFiles(model, (clip,), clip), "world-clip.safetensors is no VAE", pictures=True)


def test_a_vae_of_another_family_is_refused(
    refuse: Refuse, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sd

    class Deep(comfy.sd.VAE):
        """As those of SD3 and Flux."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.latent_channels = 16

    monkeypatch.setattr(comfy.sd, "VAE", Deep)
    files = ModelFiles(parts["model"], (parts["clip"],), parts["vae"])
    refuse(files, "VAE of 16 channels, and the latents of .* have 4", pictures=True)


def test_a_text_encoder_that_lacks_a_weight_is_refused(
    refuse: Refuse, parts: dict[str, Path], tmp_path: Path
) -> None:
    with safe_open(parts["clip"], "pt") as file:
        names = [name for name in file.keys() if not name.endswith("layers.3.mlp.fc1.bias")]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in names}, tmp_path / "cut.safetensors")
    refuse(
        ModelFiles(parts["model"], (tmp_path / "cut.safetensors",)),
        r"cut\.safetensors lacks 1 of .*text encoder.*clip_l.*layers\.3\.mlp\.fc1\.bias",
    )


def test_a_vae_that_lacks_a_weight_is_refused(
    refuse: Refuse, checkpoint: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    def cut(source: Path) -> Path:
        with safe_open(source, "pt") as file:
            names = [name for name in file.keys() if not name.endswith("taesd_decoder.1.bias")]  # noqa: SIM118
            save_file({name: file.get_tensor(name) for name in names}, tmp_path / source.name)
        return tmp_path / source.name

    lacks = r"lacks 1 of .* VAE, for example taesd_decoder\.1\.bias"
    in_parts = ModelFiles(parts["model"], (parts["clip"],), cut(parts["vae"]))
    refuse(in_parts, rf"world-vae\.safetensors {lacks}", pictures=True)
    refuse(ModelFiles(cut(checkpoint)), lacks, pictures=True)


def test_missing_files_are_named(comfy: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    for files, what in (
        (ModelFiles(parts["model"], (tmp_path / "no.safetensors",)), "text encoder"),
        (ModelFiles(parts["model"], (parts["clip"],), tmp_path / "no.safetensors"), "VAE"),
    ):
        with pytest.raises(FileNotFoundError, match=f"There is no {what} .*no.safetensors"):
            Denoiser.load(files, comfy)


def test_text_encoders_come_in_any_order_and_only_together(
    comfy: Path, refuse: Refuse, tmp_path: Path
) -> None:
    parts = write_parts("KOALA_700M", tmp_path, text_encoders=["clip_l", "clip_g"])
    model, clip_l, clip_g = parts.values()
    texts = ["a cat", "two dogs, running"]
    there, back = (
        Denoiser.load(ModelFiles(model, encoders), comfy).embed(texts)
        for encoders in ((clip_l, clip_g), (clip_g, clip_l))
    )
    assert there.cross.shape[2] == 2048
    assert torch.equal(there.cross, back.cross)
    refuse(ModelFiles(model, (clip_l,)), "not the text encoders of Stable Diffusion XL.*clip_g")


def test_stable_diffusion_3_can_do_without_its_other_text_encoders(
    comfy: Path, refuse: Refuse, tmp_path: Path
) -> None:
    parts = write_parts("SD3", tmp_path, text_encoders=["clip_l", "clip_g"])
    model, clip_l, clip_g = parts.values()
    text = Denoiser.load(ModelFiles(model, (clip_l,)), comfy).embed(["a cat"])
    assert text.cross.shape[2] == 4096
    refuse(ModelFiles(model), r"Give --text-encoder the file of clip_l \(clip_g and t5xxl too")
    refuse(ModelFiles(model, (clip_g,)), "not the text encoders of Stable Diffusion 3")
    refuse(ModelFiles(model, (model,)), "not the text encoders of Stable Diffusion 3")
    refuse(ModelFiles(model, (clip_l, model)), "not the text encoders of Stable Diffusion 3")


def test_the_file_that_lacks_a_weight_is_named(refuse: Refuse, tmp_path: Path) -> None:
    parts = write_parts("KOALA_700M", tmp_path, text_encoders=["clip_l", "clip_g"])
    state = torch.load(parts["clip_g"])
    cut = {name: value for name, value in state.items() if not name.endswith(".3.mlp.fc1.bias")}
    torch.save(cut, tmp_path / "cut.ckpt")
    refuse(
        ModelFiles(parts["model"], (tmp_path / "cut.ckpt", parts["clip_l"])),
        r"cut\.ckpt lacks 1 of .*text encoder.*clip_g.*layers\.3\.mlp\.fc1\.bias",
    )


def test_running_out_of_memory_is_no_wrong_file(
    comfy: Path, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sd

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", full)
    with pytest.raises(torch.OutOfMemoryError):
        Denoiser.load(ModelFiles(parts["model"], (parts["clip"],)))


def test_a_diffusion_model_alone_is_loaded_with_what_its_file_says_of_itself(
    comfy: Path, parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sd

    said: list[object] = []
    load = comfy.sd.load_diffusion_model_state_dict

    def listen(state: dict, **kwargs: object) -> object:
        said.append(kwargs.get("metadata"))
        return load(state, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", listen)
    with safe_open(parts["model"], "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(state, tmp_path / "said.safetensors", metadata={"by": "us"})
    Denoiser.load(ModelFiles(tmp_path / "said.safetensors", (parts["clip"],)))
    assert said == [{"by": "us"}]
