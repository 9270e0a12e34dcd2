"""That the benchmarks run, and what they write; not how fast anything is."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.run import main
from benchmarks.sampling import main as time_sampling

VARIANTS = ("active", "guarded", "safe", "hook_lora", "two_forwards")


def test_the_quick_run_writes_every_figure(comfy: Path, tmp_path: Path) -> None:
    main(quick=True, output=tmp_path / "bench.json")
    results = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert results["machine"].keys() >= {"cpu", "cores", "device", "torch", "comfyui", "date"}
    sampling, generate = results["sampling"], results["generate"]
    assert list(sampling) == ["demo"]
    ratios = [sampling["demo"][f"{variant}_over_plain"] for variant in (*VARIANTS, "mixed")]
    ratios += [generate["heads_over_atoms_time"], generate["heads_over_atoms_bytes"]]
    ratios += [results["layers"][f"{way}_over_plain"] for way in ("shared", "kept")]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios)

    # The variants must do the same work for their ratios to mean anything.
    runs = sampling["demo"]["batch_1"]
    assert runs["safe"]["difference_from_plain"] == 0
    assert runs["active"]["difference_from_plain"] > 1e-3
    assert all(
        runs[name]["difference_from_active"] < 1e-4 for name in ("hook_lora", "two_forwards")
    )
    assert {name: run["calls_per_step"] for name, run in runs.items()} == {
        "plain": 1,
        "active": 1,
        "guarded": 1,
        "safe": 1,
        "hook_lora": 2,
        "two_forwards": 2,
    }


def test_one_variant_alone(comfy: Path, tmp_path: Path) -> None:
    time_sampling(quick=True, variant=["safe"], seconds=0, output=tmp_path / "sampling.json")
    results = json.loads((tmp_path / "sampling.json").read_text(encoding="utf-8"))
    demo = results["sampling"]["demo"]
    assert set(demo["batch_1"]) == {"plain", "safe"}
    assert demo["safe_over_plain"] > 0
    assert "mixed_over_plain" not in demo
    assert demo["batch_1"]["safe"]["difference_from_plain"] == 0
