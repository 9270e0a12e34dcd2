"""The model folder ``models/unhype``."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

FOLDER = "unhype"
EXTENSIONS = {".safetensors"}


def register() -> None:
    """Tell ComfyUI of the folder, keeping paths that a user's extra_model_paths.yaml added."""
    paths, _ = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    own = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.folder_names_and_paths[FOLDER] = (list(dict.fromkeys([*paths, own])), EXTENSIONS)


def list_checkpoints() -> list[str]:
    """The packs in the folder, by name."""
    register()
    return folder_paths.get_filename_list(FOLDER)


def checkpoint_path(name: str) -> Path:
    """Where a pack is.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    register()
    path = folder_paths.get_full_path(FOLDER, name) if name else None
    if path is None:
        folders = " or ".join(folder_paths.get_folder_paths(FOLDER))
        what = f"no pack {name!r}" if name else "no pack chosen"
        raise FileNotFoundError(
            f"There is {what}. Put UnHype packs (.safetensors) into {folders}, refresh the node list, and choose one."
        )
    return Path(path)


def find_problem(name: str) -> str | None:
    """Why there is no pack of that name, if there is none."""
    try:
        checkpoint_path(name)
    except FileNotFoundError as error:
        return str(error)
    return None


def fingerprint(name: str) -> str:
    """Something that changes when the file of a pack does."""
    try:
        stat = checkpoint_path(name).stat()
    except FileNotFoundError:
        return "missing"
    return f"{stat.st_mtime_ns}-{stat.st_size}"
