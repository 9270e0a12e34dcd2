"""The real server starts with this repository as a pack, and leaves nothing behind."""

import os
import socket
from pathlib import Path

import pytest

from demo.host import make_base
from demo.server import ComfyServer, ServerError, WorkflowError


def test_server_boots_with_the_pack_and_leaves_no_process(comfyui: Path, tmp_path: Path) -> None:
    with ComfyServer(comfyui, make_base(tmp_path), threads=1) as server:
        assert server.process is not None
        pid, port = server.process.pid, server.port
        assert "CheckpointLoaderSimple" in server.get_json("/object_info")

        with pytest.raises(WorkflowError, match="NoSuchNode"):
            server.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})

        empty = {
            "class_type": "EmptyImage",
            "inputs": {"width": 8, "height": 8, "batch_size": 2, "color": 0},
        }
        save = {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "boot"},
        }
        images = server.images(server.run({"1": empty, "2": save}))
        assert [image[:4] for image in images] == [b"\x89PNG"] * 2

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_pack_that_fails_to_import_is_named_with_its_reason(
    comfyui: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "custom_nodes" / "broken"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('bolts missing')\n")
    server = ComfyServer(comfyui, tmp_path, threads=1)
    with pytest.raises(ServerError, match=r"(?s)could not import .*broken.*bolts missing"), server:
        pass
    assert server.process is None


def test_a_server_that_ends_early_shows_its_last_lines(comfyui: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with (
        pytest.raises(ServerError, match=r"(?s)exit code 1 .*custom_nodes"),
        ComfyServer(comfyui, base),
    ):
        pass
