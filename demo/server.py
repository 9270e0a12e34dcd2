"""Run the real ComfyUI server for a while, and give it workflows.

with ComfyServer(prepare(), make_base(folder)) as server:
    outputs = server.wait(server.queue(workflow))
    images = server.images(outputs)
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from unhype.host.locate import has_accelerator

from .host import server_environment

ADDRESS = "127.0.0.1"
LOG_TAIL = 30
PATIENCE = 10.0  # seconds the server has to stop when asked, each time
FAILED_PACK = re.compile(r"seconds \(IMPORT FAILED\): (.+)")

Workflow = dict[str, dict]
Outputs = dict[str, dict]


class ServerError(RuntimeError):
    """The server did not start, stopped by itself, or cannot be used as asked."""


class WorkflowError(RuntimeError):
    """The server refused a workflow, or failed while running it."""


class ComfyServer:
    """A ComfyUI server on the loopback address, started on entry and stopped on exit.

    Args:
        comfyui: Folder of ComfyUI, as ``prepare`` gives it.
        base: Folder with models, custom nodes, input and output, as ``make_base`` lays it out.
        port: Port to listen on; a free one by default.
        threads: CPU threads of the server (OMP_NUM_THREADS); the environment's by default.
        ready_timeout: Seconds until the server must answer.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        port: int | None = None,
        threads: int | None = None,
        ready_timeout: float = 300.0,
    ) -> None:
        self.comfyui = comfyui.absolute()
        self.base = base.absolute()
        self.log = self.base / "server.log"
        self.port = port
        self.threads = threads
        self.ready_timeout = ready_timeout
        self.process: subprocess.Popen[bytes] | None = None
        # Loopback must not go through a proxy named in the environment.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._handles_sigterm = False

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    def __enter__(self) -> ComfyServer:
        self.port = _free_port(self.port)
        self._end_on_sigterm()
        try:
            with self.log.open("wb") as log:
                self.process = self._start(log)
            self._wait_until_ready()
            self._refuse_failed_packs()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server: ask as Ctrl-C would, then insist. Stopping twice is harmless."""
        process, self.process = self.process, None
        try:
            if process is not None:
                _end(process)
        finally:
            if self._handles_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._handles_sigterm = False

    def queue(self, workflow: Workflow) -> str:
        """Queue a workflow in API form and return its prompt id.

        Raises:
            WorkflowError: The server refused it; the message names the nodes and inputs at fault.
        """
        # An empty extra_pnginfo, so that nodes can leave texts in saved pictures as in a run from the page.
        body = json.dumps({"prompt": workflow, "extra_data": {"extra_pnginfo": {}}}).encode()
        request = urllib.request.Request(
            f"{self.url}/prompt", body, {"Content-Type": "application/json"}
        )
        try:
            return json.loads(self._open(request))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise WorkflowError(_refusal(error.read())) from None

    def wait(
        self,
        prompt_id: str,
        progress: Callable[[float], None] | None = None,
        *,
        timeout: float = 3600.0,
    ) -> Outputs:
        """Wait for a prompt and return its outputs by node id.

        Args:
            progress: Called a few times a second with the seconds waited so far.

        Raises:
            WorkflowError: A node failed, or the run was interrupted.
            ServerError: The server stopped by itself, or did not finish in time.
        """
        started = time.monotonic()
        while True:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _finished(entry)
            waited = time.monotonic() - started
            if waited > timeout:
                raise ServerError(
                    f"The workflow did not finish in {timeout:.0f} s. The server's last lines:\n{self.log_tail()}"
                )
            if progress is not None:
                progress(waited)
            time.sleep(0.05 if waited < 5 else 0.25)

    def run(self, workflow: Workflow, progress: Callable[[float], None] | None = None) -> Outputs:
        """Queue a workflow, wait for it, and return its outputs by node id."""
        return self.wait(self.queue(workflow), progress)

    def images(self, outputs: Outputs) -> list[bytes]:
        """Return every image of a prompt's outputs as the bytes of its file, in the order of the outputs."""
        return [
            self.get(f"/view?{urllib.parse.urlencode(image)}")
            for output in outputs.values()
            for image in output.get("images", [])
        ]

    def get(self, path: str) -> bytes:
        """Return what the server answers to a GET request."""
        return self._open(urllib.request.Request(self.url + path))

    def get_json(self, path: str) -> dict:
        """Return the JSON object that the server answers to a GET request."""
        return json.loads(self.get(path))

    def log_tail(self, lines: int = LOG_TAIL) -> str:
        """Return the last lines that the server printed."""
        return "\n".join(self._log_text().splitlines()[-lines:])

    def _open(self, request: urllib.request.Request) -> bytes:
        try:
            with self._opener.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ServerError(
                f"{self.url} does not answer ({error}). The server's last lines:\n{self.log_tail()}"
            ) from error

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        arguments = [
            *("--listen", ADDRESS, "--port", str(self.port)),
            *("--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"),
            *("--disable-api-nodes", "--disable-auto-launch"),
            *(() if has_accelerator() else ("--cpu",)),
        ]
        return subprocess.Popen(
            [sys.executable, "main.py", *arguments],
            cwd=self.comfyui,
            env=server_environment(self.threads),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + self.ready_timeout
        while True:
            if (code := self.process.poll()) is not None:
                raise ServerError(
                    f"ComfyUI in {self.comfyui} ended with exit code {code} before it was ready. "
                    f"Its last lines ({self.log}):\n{self.log_tail()}"
                )
            try:
                self.get("/system_stats")
                return
            except (ServerError, urllib.error.HTTPError):
                pass
            if time.monotonic() > deadline:
                raise ServerError(
                    f"ComfyUI in {self.comfyui} was not ready after {self.ready_timeout:.0f} s. "
                    f"Its last lines ({self.log}):\n{self.log_tail()}"
                )
            time.sleep(0.2)

    def _refuse_failed_packs(self) -> None:
        before, found, after = self._log_text().partition("Import times for custom nodes")
        if found and (failed := FAILED_PACK.findall(after)):
            # ComfyUI's own extras come first, and may fail for reasons of their own.
            lines = before.splitlines()
            start = max(
                (i + 1 for i, line in enumerate(lines) if "comfy_extras" in line), default=0
            )
            raise ServerError(
                f"ComfyUI could not import {', '.join(failed)}. What it said before ({self.log}):\n"
                + "\n".join(lines[start:][-LOG_TAIL:])
            )

    def _log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _end_on_sigterm(self) -> None:
        """Let a polite kill of this process unwind, so that the server does not outlive it."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_on_signal)
            self._handles_sigterm = True


def _free_port(port: int | None) -> int:
    """Return ``port`` if nothing listens on it, or any free one for None."""
    with socket.socket() as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port or 0))
        except OSError as error:
            raise ServerError(
                f"Port {port} of {ADDRESS} cannot be used ({error.strerror}). "
                "Stop the program that holds it, or leave the port out to get a free one."
            ) from error
        return probe.getsockname()[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    # Ctrl-C lets ComfyUI remove its temporary files; it is ignored where it was ignored at its start.
    interrupt = process.terminate if sys.platform == "win32" else _sender(process, signal.SIGINT)
    for ask, patience in (
        (interrupt, PATIENCE),
        (process.terminate, PATIENCE),
        (process.kill, None),
    ):
        ask()
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def _sender(process: subprocess.Popen[bytes], number: signal.Signals) -> Callable[[], None]:
    return lambda: process.send_signal(number)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _refusal(body: bytes) -> str:
    """Put the server's answer to a workflow it refuses into a sentence per fault."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"ComfyUI refused the workflow: {body.decode(errors='replace')[:500]}"
    error = answer.get("error", {})
    lines = [f"ComfyUI refused the workflow: {_with_details(error)}"]
    for node_id, node in (answer.get("node_errors") or {}).items():
        lines += [
            f"  node {node_id} ({node.get('class_type')}): {_with_details(fault)}"
            for fault in node.get("errors", [])
        ]
    return "\n".join(lines)


def _with_details(error: dict | str) -> str:
    if isinstance(error, str):
        return error
    return ": ".join(filter(None, (error.get("message"), error.get("details"))))


def _finished(entry: dict) -> Outputs:
    """Return the outputs of a history entry.

    Raises:
        WorkflowError: The run failed or was interrupted.
    """
    for name, message in entry.get("status", {}).get("messages", []):
        where = f"node {message.get('node_id')} ({message.get('node_type')})"
        if name == "execution_error":
            trace = "".join(message.get("traceback", []))
            raise WorkflowError(
                f"{where} failed: {message['exception_message'].strip()} "
                f"[{message['exception_type']}]\n{trace}"
            )
        if name == "execution_interrupted":
            raise WorkflowError(f"The run was interrupted at {where}.")
    return entry["outputs"]
