"""The benchmark of exactness: its own sums, on small models, and on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.parity import compare
from unhype.families import family_of_host_class

from .tiny import TINY, build, fill

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_GPU = pytest.param(
    CUDA,
    marks=(
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
    id="cuda",
)
FAMILIES = ("SD15", "SDXL", "SD3", "FluxSchnell")


@pytest.mark.parametrize("device", [pytest.param(CPU, id="cpu"), ON_GPU])
@pytest.mark.parametrize("host_class", FAMILIES)
def test_errors_are_those_of_rounding(comfy: Path, host_class: str, device: torch.device) -> None:
    def make(dtype: torch.dtype):
        model = build(host_class, TINY[host_class], dtype=dtype)
        fill(model.diffusion_model)
        return model.to(device)

    with torch.inference_mode():
        exact = compare(make, torch.float32, side=8, tokens=77)
        rounded = compare(make, torch.bfloat16, side=8, tokens=77)
    assert exact["layer"] <= 1e-6
    assert exact["whole"] <= 1e-5
    assert exact["whole_merged"] == 0
    # Where results are kept they are rounded once.
    kept = family_of_host_class(host_class).per_chunk
    assert 1e-3 <= rounded["layer"] <= (2e-3 if kept else 3.5e-3)
    assert 1e-3 <= rounded["layer_merged"] <= 3.5e-3
    assert rounded["whole"] <= 1.3 * rounded["whole_merged"]
