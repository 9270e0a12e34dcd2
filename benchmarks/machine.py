"""Where and when a benchmark ran, and how its results are kept."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from demo.host import HostUnavailableError, prepare
from unhype.host.locate import REPOSITORY, use_as_library

OUT = REPOSITORY / "benchmarks" / "out"
CPU_INFO = Path("/proc/cpuinfo")


def start(console: Console) -> dict[str, Any]:
    """Make ComfyUI importable, and describe the machine, the versions and the date."""
    try:
        use_as_library(prepare())
    except HostUnavailableError as error:
        console.print(f"[bold red]{escape(str(error))}[/bold red]")
        raise typer.Exit(1) from error
    from comfy.model_management import get_torch_device
    from comfyui_version import __version__ as host_version

    device, cores = get_torch_device(), _cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores / 2:
        console.print(
            f"[yellow]The machine is busy (load {load:.1f} on {cores} cores); the ratios will be unsteady.[/yellow]"
        )
    return {
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": load,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "comfyui": host_version,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(path: Path, results: dict[str, Any], console: Console) -> None:
    """Keep results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written: {path}")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
