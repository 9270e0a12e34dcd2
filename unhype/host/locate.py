"""Find ComfyUI, and make it importable in a process that it did not start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MARKERS = ("main.py", "nodes.py", "comfy/sd.py")


class ComfyUINotFoundError(FileNotFoundError):
    """No ComfyUI in any of the places it may be."""


class NotComfyUIError(ValueError):
    """A folder that was named as ComfyUI is something else."""


def cache_dir() -> Path:
    """Return the folder for what the project downloads: UNHYPE_CACHE, or .cache in the repository."""
    return Path(os.environ.get("UNHYPE_CACHE") or REPOSITORY / ".cache").expanduser().absolute()


def cached_comfyui() -> Path:
    """Return where the project's own copy of ComfyUI is, or would be."""
    return cache_dir() / "comfyui" / "ComfyUI"


def find_comfyui(explicit: Path | None = None) -> Path:
    """Return the folder of ComfyUI: the one given, COMFYUI_PATH, the one around this pack, or the cached copy.

    Raises:
        NotComfyUIError: The folder given, or COMFYUI_PATH, is not a ComfyUI.
        ComfyUINotFoundError: There is none in any of the places.
    """
    if explicit is not None:
        return _checked(explicit, "the folder given")
    if from_environment := os.environ.get("COMFYUI_PATH"):
        return _checked(Path(from_environment), "COMFYUI_PATH")
    around = _comfyui_around(REPOSITORY) or _comfyui_around(Path(__file__).absolute().parents[2])
    if around is not None:
        return around
    if is_comfyui(cached_comfyui()):
        return cached_comfyui()
    raise ComfyUINotFoundError(
        f"No ComfyUI found: COMFYUI_PATH is not set, {REPOSITORY} is not inside a ComfyUI's custom_nodes, "
        f"and there is no copy in {cached_comfyui()}. "
        "Set COMFYUI_PATH to your ComfyUI folder, or run `make host` to fetch a copy for this project."
    )


def is_comfyui(path: Path) -> bool:
    """Tell whether a folder holds a whole ComfyUI."""
    return not _missing(path)


def has_accelerator() -> bool:
    """Tell whether torch sees a device that ComfyUI would choose over the CPU."""
    import torch

    return (
        torch.cuda.is_available()
        or torch.backends.mps.is_available()
        or (hasattr(torch, "xpu") and torch.xpu.is_available())
    )


def use_as_library(path: Path) -> None:
    """Make ``import comfy`` work in a plain Python process; do nothing where ComfyUI is already loaded.

    Call it before the first import of ``comfy``: the device is chosen while ``comfy.model_management`` is imported.
    """
    if "comfy.model_management" in sys.modules:
        return
    from . import vision

    path = _checked(path, "the folder given")
    if str(path) not in sys.path:
        # First: ComfyUI's nodes.py and utils/ must win over same-named packages, such as this pack's nodes/.
        sys.path.insert(0, str(path))
        vision.declare_when_imported()

    import comfy.cli_args

    if not has_accelerator():
        comfy.cli_args.args.cpu = True


def _checked(path: Path, source: str) -> Path:
    path = path.expanduser().absolute()
    if missing := _missing(path):
        raise NotComfyUIError(
            f"Expected {source} to be a ComfyUI folder, got {path}, which has no {missing[0]}. "
            "Give the folder that holds ComfyUI's main.py."
        )
    return path


def _comfyui_around(pack: Path) -> Path | None:
    """Return the ComfyUI whose custom_nodes holds the pack."""
    if pack.parent.name == "custom_nodes" and is_comfyui(pack.parent.parent):
        return pack.parent.parent
    return None


def _missing(path: Path) -> list[str]:
    return [marker for marker in MARKERS if not (path / marker).is_file()]
