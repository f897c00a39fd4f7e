"""A vllmd as its users run it: a process with a configuration file, told what to do by vllmctl."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from tests.e2e.processes import Process, find, shared_memory
from vllmd.ctl.client import Client
from vllmd.ctl.feed import Feed
from vllmd.places import mark_of

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LIMIT = 300.0  # seconds; a start of a real vLLM takes 25 to 70
CONFIG = """
[daemon]
socket = {socket}
runtime_dir = {runtime}
state_dir = {state}
log_dir = {log}
cache_dir = {cache}
log_format = "json"
spare = {spare}
[http]
listen = {listen}
[devices.cpu]
limit = "{limit}"
[defaults]
executable = {vllm}
gpus = ["cpu"]
max_model_len = 512
kv_cache = "64MiB"
args = {{ enforce-eager = true }}
{defaults}
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """A vllmctl that has ended."""

    code: int
    out: str
    err: str
    seconds: float


class Start(Protocol):
    """Starts a daemon with these tables of [models]."""

    def __call__(
        self, models: str, *, limit: str = ..., defaults: str = ..., web: bool = ..., spare: int = ...
    ) -> "Daemon": ...


class Daemon:
    """One vllmd with real engines. `stop` it, then `check_nothing_left`."""

    def __init__(
        self, folder: Path, engine: Path, cache: Path, *, limit: str, defaults: str, web: bool = False, spare: int = 0
    ) -> None:
        self.folder, self.models = folder, engine / "models"
        self.runtime = Path(tempfile.mkdtemp(prefix="vd-"))  # a pytest directory is too long for a socket
        self.socket, self.log_dir = self.runtime / "s", folder / "log"
        self.mark = mark_of(folder / "state")
        self.seen_shm: set[Path] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "vllmd.jsonl"
        quoted = {
            "socket": self.socket, "runtime": self.runtime, "state": folder / "state", "log": self.log_dir,
            "cache": cache, "vllm": engine / "bin/vllm",
        }  # fmt: skip
        self._head = CONFIG.format(
            **{key: json.dumps(str(value)) for key, value in quoted.items()}, limit=limit, defaults=defaults,
            listen='["127.0.0.1:0"]' if web else "[]", spare=spare,
        )  # fmt: skip

    # -- life

    def configure(self, models: str) -> None:
        """Write the configuration; `models` are its tables, where {models} is the folder of the real models."""
        (self.folder / "vllmd.toml").write_text(self._head + models.replace("{models}", str(self.models)))

    def start(self) -> None:
        """Returns when it has said that it is ready."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [BIN / "vllmd", "--config", self.folder / "vllmd.toml"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        limit = time.monotonic() + 30
        while not self.said("vllmd is ready"):
            assert self._process.poll() is None, f"vllmd ended:\n{self._log.read_text()}"
            assert time.monotonic() < limit, f"vllmd is not ready:\n{self._log.read_text()}"
            time.sleep(0.01)  # between looks at its log; nothing else tells

    def stop(self) -> None:
        """SIGTERM twice: now, without letting requests finish."""
        if self._process is None or self._process.poll() is not None:
            return
        self.seen_shm |= shared_memory(self.tree())
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(LIMIT) == 0, self._log.read_text()[-4000:]

    def check_nothing_left(self) -> None:
        """No process, no socket, no scratch directory, no shared memory."""
        left = [str(path) for path in self.runtime.rglob("*") if path.is_socket() or path.is_file()]
        shutil.rmtree(self.runtime)
        assert find(self.mark) == []
        assert left == []
        assert [path for path in self.seen_shm if path.exists()] == []

    # -- look

    def said(self, text: str) -> list[dict[str, Any]]:
        """Lines of vllmd's own log that contain `text`."""
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if text in line and line.startswith("{")]

    @property
    def url(self) -> str:
        """Where it listens for HTTP."""
        return str(self.said("vllmd is ready")[-1]["web"][0])

    def status(self, model: str) -> dict[str, Any]:
        """The model as in `vllmctl status --json`."""
        return named(self.client.get("/api/v1/status"), model)

    @property
    def client(self) -> Client:
        return Client(str(self.socket))

    def why(self, model: str) -> dict[str, Any]:
        """What `vllmctl why --json` prints."""
        return dict(json.loads(self.ctl("why", model, "--json").out))

    def tree(self, model: str = "") -> list[Process]:
        """The live processes of a model, or of all."""
        found = find(f"{self.mark}:{model}:" if model else self.mark)
        self.seen_shm |= shared_memory(found)
        return found

    def last_event(self) -> int:
        """Where the events stand: `states` looks from there on."""
        lines = self.client.fetch("GET", "/api/v1/events?follow=0")[1].splitlines()
        return int(json.loads(lines[-1])["id"]) if lines else 0

    def states(self, model: str, after: int, was: str) -> list[str]:
        """The states that the model came to since `after`, when it was `was`."""
        lines = self.client.fetch("GET", f"/api/v1/events?follow=0&after={after}")[1].splitlines()
        seen = [event["data"] for event in map(json.loads, lines) if event["event"] == "model"]
        mine = [each["state"] for each in seen if each["name"] == model]
        return [state for before, state in pairwise([was, *mine]) if state != before]

    # -- act

    def ctl(self, *words: str) -> Ran:
        """Run vllmctl to its end."""
        began = time.monotonic()
        done = subprocess.run(
            [BIN / "vllmctl", "--socket", self.socket, *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT, check=False,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        if words[0] == "start":
            self.tree()  # what it has in shared memory must be gone at the end
        return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def wait(self, model: str, until: Callable[[dict[str, Any]], object], limit: float = LIMIT) -> dict[str, Any]:
        """The model, once it is so; every event is looked at, nothing is slept for."""
        feed = Feed(self.client)
        end = time.monotonic() + limit
        try:
            now = feed.model(model) or {}
            while not until(now):
                assert time.monotonic() < end, f"still not so after {limit:.0f} s: {now}"
                for kind, data in feed.poll(1.0)[0]:
                    # Each, not the newest alone: a state may be over when it is looked at.
                    now = data if kind == "model" and data["name"] == model else now
                    if until(now):
                        break
        finally:
            feed.close()
        return now


def named(status: dict[str, Any], model: str) -> dict[str, Any]:
    """One model of a status."""
    return next(each for each in status["models"] if each["name"] == model)
