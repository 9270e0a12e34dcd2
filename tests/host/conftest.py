"""The real ComfyUI, for the tests in this folder."""

import os
from pathlib import Path

import pytest

from demo.host import HostUnavailableError, prepare
from unhype.host.locate import use_as_library

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Return a ComfyUI that this Python can run."""
    try:
        return prepare()
    except HostUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no ComfyUI: {error}")


@pytest.fixture(scope="session")
def comfy(comfyui: Path) -> Path:
    """Make ``import comfy`` work in this process; import it inside the test."""
    use_as_library(comfyui)
    return comfyui
