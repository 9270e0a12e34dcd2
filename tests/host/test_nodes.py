"""The pack as ComfyUI loads it: its nodes, their pages, and what they say."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unhype.host.embed import embed_text, read_entry
from unhype.host.generate import generate
from unhype.host.locate import REPOSITORY

NODE_IDS = ["UnHypeLoader", "CLIPToLoRA", "ApplyDynamicLoRA", "UnHypeGuard", "UnHypeInspect"]
SNAPSHOT = Path(__file__).with_name("schema.json")
CAT, DOG = "a photo of a cat", "a photo of a dog"


@pytest.fixture(autouse=True)
def as_in_the_executor() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def nodes(comfy: Path) -> dict[str, Any]:
    """Our node classes, loaded by ComfyUI's own loader."""
    import nodes

    assert Path(nodes.__file__).parent == comfy, "ComfyUI's nodes.py, not the pack's nodes/"
    before = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(str(REPOSITORY)))
    assert nodes.EXTENSION_WEB_DIRS[REPOSITORY.name] == str(REPOSITORY / "web")
    return {
        name: nodes.NODE_CLASS_MAPPINGS[name]
        for name in nodes.NODE_CLASS_MAPPINGS
        if name not in before
    }


@pytest.fixture
def models(comfy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folder, empty."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    return tmp_path


@pytest.fixture
def packs(models: Path, make_pack) -> Path:
    """A folder of packs with one in it that erases a cat and a bus."""
    folder = models / "unhype"
    make_pack(concepts=("cat", "bus"), name="both.safetensors", folder=folder)
    return folder


def describe(node: Any) -> dict[str, Any]:
    schema = node.define_schema()
    return {
        "category": schema.category,
        "inputs": [
            [i.id, i.io_type, "optional" if i.optional else "required"] for i in schema.inputs
        ],
        "outputs": [[o.display_name, o.io_type] for o in schema.outputs],
    }


def test_comfyui_finds_the_nodes(nodes: dict[str, Any]) -> None:
    assert list(nodes) == NODE_IDS


def test_the_interface_is_as_published(nodes: dict[str, Any], models: Path) -> None:
    # Ids, inputs, outputs and types are permanent: saved workflows hold them. A change is a new node.
    described = {name: describe(node) for name, node in nodes.items()}
    assert described == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NODE_IDS)
def test_every_socket_is_explained(nodes: dict[str, Any], models: Path, name: str) -> None:
    schema = nodes[name].define_schema()
    assert schema.description.endswith(".")
    assert all(socket.tooltip for socket in (*schema.inputs, *schema.outputs))
    page = (REPOSITORY / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    sockets = [i.id for i in schema.inputs] + [o.display_name for o in schema.outputs]
    assert [s for s in sockets if f"`{s}`" not in page] == []


def test_the_loader_lists_packs_and_nothing_else(nodes: dict[str, Any], packs: Path) -> None:
    (packs / "notes.txt").write_text("x")
    (names, *_) = nodes["UnHypeLoader"].define_schema().inputs
    assert names.options == ["both.safetensors"]


def test_the_loader_keeps_paths_that_the_user_added(nodes, models: Path, tmp_path_factory) -> None:
    import folder_paths

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mine.safetensors").write_bytes(b"")
    folder_paths.add_model_folder_path("unhype", str(elsewhere))
    assert nodes["UnHypeLoader"].define_schema().inputs[0].options == ["mine.safetensors"]
    assert folder_paths.get_folder_paths("unhype") == [str(elsewhere), str(models / "unhype")]


def test_an_empty_folder_says_where_packs_go(nodes: dict[str, Any], models: Path) -> None:
    loader = nodes["UnHypeLoader"]
    assert loader.define_schema().inputs[0].options == []
    with pytest.raises(FileNotFoundError, match="no pack 'demo-cat.*unhype.*choose one"):
        loader.execute("demo-cat.safetensors")
    assert str(models / "unhype") in loader.validate_inputs("demo-cat.safetensors")
    assert loader.validate_inputs(None) is True


def test_the_loader_runs_again_when_the_file_changes(nodes: dict[str, Any], packs: Path) -> None:
    loader, path = nodes["UnHypeLoader"], packs / "both.safetensors"
    assert loader.validate_inputs(path.name) is True
    before = loader.fingerprint_inputs(path.name)
    assert loader.fingerprint_inputs(path.name) == before
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert loader.fingerprint_inputs(path.name) != before


def test_only_the_named_concepts_are_active(nodes: dict[str, Any], packs: Path) -> None:
    loader = nodes["UnHypeLoader"]
    assert loader.execute("both.safetensors").args[0].active == (True, True)
    assert loader.execute("both.safetensors", " bus,\n").args[0].active == (False, True)
    with pytest.raises(ValueError, match="no concept 'horse'.*cat, bus"):
        loader.execute("both.safetensors", "horse")


def test_the_three_nodes_in_a_row(nodes: dict[str, Any], packs: Path, world: Any) -> None:
    (pack,) = nodes["UnHypeLoader"].execute("both.safetensors").args
    positive = world.encode(CAT)
    lora, state, fired = nodes["CLIPToLoRA"].execute(pack, positive).args
    assert fired == "fired: cat (1.00), bus (1.00)"
    assert len(state) == 3 * 8
    model, conditioning = nodes["ApplyDynamicLoRA"].execute(world.model, positive, lora).args
    assert model is not world.model
    assert conditioning[0][1].keys() - positive[0][1].keys() == {"unhype"}


def test_what_fired_is_told_entry_by_entry(world: Any, make_pack) -> None:
    pack = make_pack(fires=(CAT, DOG))
    report = generate(pack, world.encode(CAT) + world.encode(DOG)).report()
    assert report == "fired: cat (1.00)\nnothing fired (nearest: cat 0.00)"


def test_concepts_that_are_off_are_not_the_nearest(world: Any, make_pack) -> None:
    pack = make_pack(concepts=("cat", "bus"), fires=True).only(["bus"])
    assert generate(pack, world.encode(DOG)).report() == "fired: bus (1.00)"


def test_an_entry_without_pooled_output_is_refused(world: Any, make_pack) -> None:
    entry = [world.encode(CAT)[0][0], {"pooled_output": None}]
    with pytest.raises(
        ValueError, match=r"Entry 2 .*no vector of clip.*768.*UnHype Guard.*or connect a CLIP"
    ):
        generate(make_pack(), [*world.encode(CAT), entry])
    with pytest.raises(ValueError, match="no vector of"):
        generate(make_pack(), [[entry[0], {}]])


def test_an_entry_without_pooled_output_can_take_the_text(world: Any, make_pack) -> None:
    entry = [world.encode(CAT)[0][0], {}]
    lora = generate(make_pack(fires=(CAT, DOG)), [entry], clip=world.clip, text=CAT)
    assert lora.report() == "fired: cat (1.00)"


def test_pooled_output_of_another_encoder_is_refused(world: Any, make_pack) -> None:
    entry = [world.encode(CAT)[0][0], {"pooled_output": torch.randn(1, 1280)}]
    with pytest.raises(ValueError, match=r"shape \(1, 1280\), expected \(n, 768\)"):
        generate(make_pack(), [entry])


def test_a_zeroed_conditioning_asks_for_nothing(world: Any, make_pack) -> None:
    cross, extra = world.encode(CAT)[0]
    zeroed = [[cross * 0, {"pooled_output": extra["pooled_output"] * 0}]]
    lora = generate(make_pack(fires=True), zeroed)
    assert not lora.entries[0].factors.active.any()
    assert lora.report() == "nothing fired (nearest: cat 0.00)"


def test_text_without_clip_is_refused(world: Any, make_pack) -> None:
    with pytest.raises(ValueError, match="Connect CLIP too"):
        generate(make_pack(), world.encode(CAT), text=CAT)


def test_every_chunk_of_a_long_prompt_is_embedded_as_if_alone(world: Any, make_pack) -> None:
    spec = make_pack().info.spec.embedding
    # 75 words of one token each fill the first chunk.
    vectors = embed_text(world.clip, "river " * 75 + CAT, spec)
    alone = [read_entry(world.encode(text)[0], spec) for text in ("river " * 75, CAT)]
    torch.testing.assert_close(
        vectors[:2], torch.cat([found.rows for found in alone if found]), atol=1e-4, rtol=1e-4
    )


def test_nothing_hides_at_the_end_of_a_long_prompt(world: Any, make_pack) -> None:
    text = "river " * 75 + CAT
    pack, conditioning = make_pack(fires=(CAT, "river " * 75)), world.encode(text)
    assert generate(pack, conditioning).report().startswith("nothing fired")
    lora = generate(pack, conditioning, clip=world.clip, text=text)
    assert lora.report() == "fired: cat (1.00)"
    wanted = generate(pack, world.encode(CAT)).entries[0].factors
    torch.testing.assert_close(
        lora.entries[0].factors.delta(0), wanted.delta(0), atol=1e-4, rtol=1e-3
    )


def inspect(nodes: dict[str, Any], **inputs: Any) -> tuple[Any, dict[str, Any]]:
    """Run UnHypeInspect as ComfyUI does; also return what it left for the PNG."""
    metadata: dict[str, Any] = {}
    from comfy_api.latest._io import Hidden

    node = nodes["UnHypeInspect"]
    bound = node.PREPARE_CLASS_CLONE({Hidden.extra_pnginfo: metadata})
    return bound.execute(**inputs).result, metadata


def test_what_the_gate_is_less_sure_of_is_told_and_written_weaker(
    nodes, world: Any, make_pack
) -> None:
    whole = make_pack()
    graded = make_pack()
    graded.gate.config = replace(graded.gate.config, least_strength=0.2, full_strength_at=0.9999)
    conditioning = world.encode(CAT)
    norms = [
        generate(pack, conditioning).entries[0].factors.squared_norm() for pack in (whole, graded)
    ]
    share = (norms[1] / norms[0]).sqrt().item()
    assert 0.5 < share < 0.95
    (text, figures, _, _), _ = inspect(nodes, unhype=graded, conditioning=conditioning)
    told = json.loads(figures)["entries"][0]["concepts"]["cat"]["strength"]
    assert told == pytest.approx(share, abs=1e-4)
    assert f"cat (1.00, {share:.0%} of its LoRA)" in text


def test_inspect_tells_gate_change_and_what_fired(nodes, world: Any, make_pack) -> None:
    pack = make_pack(concepts=("cat", "bus"), fires=(CAT, DOG)).only(["cat"])
    conditioning = [*world.encode(CAT), *world.encode(DOG)]
    (text, figures, chart, images), metadata = inspect(
        nodes, unhype=pack, conditioning=conditioning
    )
    first, second = json.loads(figures)["entries"]
    assert first["fired"] == ["cat"]
    assert second["fired"] == []
    assert first["concepts"]["bus"] == {
        "probability": pytest.approx(1, abs=1e-3),
        "fired": False,
        "active": False,
        "strength": 0.0,
    }
    assert first["concepts"]["cat"]["strength"] == 1.0
    factors = generate(pack, world.encode(CAT)).entries[0].factors
    norms = [float(factors.delta(i)[0].norm()) for i in range(len(factors.targets))]
    assert list(first["norms"].values()) == pytest.approx(norms, rel=1e-4)
    assert set(second["norms"].values()) == {0.0}
    assert "entry 1: fired: cat" in text
    assert chart.shape[0] == 2
    assert chart.shape[-1] == 3
    assert not torch.equal(chart[0], chart[1])
    assert images is None
    assert metadata["unhype"] == {"pack": pack.name, "fired": [["cat"], []]}


def test_inspect_reads_a_text_alone(nodes, world: Any, make_pack) -> None:
    pack, picture = make_pack(fires=(CAT, DOG)), torch.rand(1, 8, 8, 3)
    (text, _, _, images), _ = inspect(
        nodes, unhype=pack, clip=world.clip, text="river " * 75 + CAT, images=picture
    )
    assert "fired: cat" in text
    assert images is picture
    with pytest.raises(ValueError, match="nothing to read"):
        inspect(nodes, unhype=pack)


def test_the_loader_sets_concepts_and_threshold(nodes, packs: Path) -> None:
    (pack,) = nodes["UnHypeLoader"].execute("both.safetensors", "bus", 0.9).result
    assert (pack.active, pack.threshold) == ((False, True), 0.9)
    (pack,) = nodes["UnHypeLoader"].execute("both.safetensors").result
    assert (pack.active, pack.threshold) == ((True, True), None)
