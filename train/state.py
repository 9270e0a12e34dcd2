"""The state of an unfinished run, beside its output: safetensors with a JSON header, no pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ConfigError

DIGEST, STEP = "unhype.digest", "unhype.step"


def state_path(output: Path) -> Path:
    """Where the state of the run that writes ``output`` is kept."""
    return output.with_suffix(".state.safetensors")


def pool_path(output: Path) -> Path:
    """Where its states z_t and predictions are kept."""
    return output.with_suffix(".pool.safetensors")


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file that appears under its name only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            part,
            metadata,
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that ``write`` wrote.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Delete it to start the run from the beginning."
        ) from error


def save_state(
    path: Path,
    *,
    digest: str,
    step: int,
    modules: dict[str, dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Everything the loop needs to go on as if it had never stopped."""
    tensors = {
        f"{part}/{name}": value for part, state in modules.items() for name, value in state.items()
    }
    raw = optimizer.state_dict()
    for index, entry in raw["state"].items():
        for name, value in entry.items():
            tensors[f"optimizer/{index}/{name}"] = torch.as_tensor(value)
    tensors["generator"] = generator.get_state()
    write(
        path, tensors, {DIGEST: digest, STEP: str(step), "groups": json.dumps(raw["param_groups"])}
    )


def load_state(
    path: Path,
    *,
    digest: str,
    modules: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Continue from ``path``; the step to go on with, 0 if there is no state.

    Raises:
        ConfigError: the state is damaged, or of a run with other settings.
    """
    if not path.exists():
        return 0
    tensors, metadata = read(path)
    if metadata.get(DIGEST) != digest:
        raise ConfigError(
            f"{path} belongs to an unfinished run with other settings. Delete it to start afresh, "
            "give another output, or go back to those settings to finish it."
        )
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in modules}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            index, _, entry = name.partition("/")
            optimizer_state.setdefault(int(index), {})[entry] = value
        elif part in parts:
            parts[part][name] = value
    for name, module in modules.items():
        module.load_state_dict(parts[name])
    optimizer.load_state_dict(
        {"state": optimizer_state, "param_groups": json.loads(metadata["groups"])}
    )
    generator.set_state(tensors["generator"])
    return int(metadata[STEP])
