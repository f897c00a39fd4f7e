"""A vllmd as a process, with fake engines: started, asked, waited for by its events, and seen to leave nothing behind.

Waiting is on the daemon's own event stream and on what it logs, never on the clock; each wait has a generous limit.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import Process, find, shared_memory
from tests.fake.environment import install
from tests.fake.make_model import make_model
from tests.remote import LIMIT, Model, Remote, Until, table
from vllmd.places import mark_of

ROOT = Path(__file__).parents[1]


class Vllmd(Remote):
    """One state directory and the daemons that run on it, one at a time. The fixture `vllmd` ends and checks it."""

    def __init__(self, folder: Path, vllm: Path, weights: Path) -> None:
        self.folder, self.weights = folder, weights
        self.runtime = Path(tempfile.mkdtemp(prefix="vd-"))  # pytest's directory is too long for a socket
        self.socket, self.config = self.runtime / "s", folder / "vllmd.toml"
        self.state_dir, self.log_dir = folder / "state", folder / "log"
        self.mark = mark_of(self.state_dir)
        self.daemon: Model = {
            "socket": self.socket, "runtime_dir": self.runtime, "state_dir": self.state_dir, "log_dir": self.log_dir,
            "cache_dir": folder / "cache", "log_format": "json", "spare": 0,
        }  # fmt: skip
        self.http: Model = {"listen": []}
        self.devices: Model = {"limit": "8GiB"}
        self.defaults: Model = {
            "executable": vllm, "model": weights, "vram": "1500MiB", "kv_cache": "32MiB", "max_model_len": 512,
            "args": {"enforce-eager": True}, "env": {"FAKE_START_S": "0.1"}, "stop_timeout": "5s", "drain": "5s",
            "restart": {"backoff": "100ms", "backoff_max": "200ms"},
        }  # fmt: skip
        self.models: dict[str, Model] = {}
        self.keys: dict[str, Model] = {}
        self.environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "VLLMD_NVML": "none"}
        self.command: Sequence[str | Path] = (sys.executable, "-m", "vllmd")
        self.exit_code = 0  # that of a daemon which the fixture ends
        self.lines: list[Model] = []  # what the daemons have logged, JSON lines
        self.said = ""  # all of it as text
        self.process: subprocess.Popen[bytes] | None = None
        self._heard = threading.Condition()
        self._seen_shm: set[Path] = set()
        self._ears: list[threading.Thread] = []

    # -- life

    def model(self, name: str, fake: Model | None = None, **keys: Any) -> "Vllmd":
        """Configure a model; `fake` are FAKE_ variables without their prefix."""
        env = {f"FAKE_{key.upper()}": str(value) for key, value in (fake or {}).items()}
        self.models[name] = {**keys, **({"env": env | keys.get("env", {})} if env or "env" in keys else {})}
        return self

    def write(self) -> None:
        """The configuration as it stands, to its file."""
        parts = [table("daemon", self.daemon), table("http", self.http), table('devices."*"', self.devices)]
        parts += [table("defaults", self.defaults), *(table(f"models.{n}", keys) for n, keys in self.models.items())]
        parts += [table(f"keys.{name}", keys) for name, keys in self.keys.items()]
        self.config.write_text("\n".join(parts))

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Start it and return at once."""
        self.process = subprocess.Popen(
            [*self.command, "--config", self.config], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=self._environment(), start_new_session=True, cwd=self.folder,
        )  # fmt: skip
        self._ears.append(threading.Thread(target=self._listen, args=(self.process,), daemon=True))
        self._ears[-1].start()
        return self.process

    def _environment(self) -> dict[str, str]:
        path = [self.environment.get("PYTHONPATH", ""), str(ROOT)]
        return self.environment | {"PYTHONPATH": os.pathsep.join(filter(None, path))}

    def start(self) -> "Vllmd":
        """Write the configuration and start; returns when it has said that it is ready."""
        self.write()
        before = len(self.lines)
        self.spawn()
        self.hear(lambda line: line["event"] == "vllmd is ready", after=before)
        return self

    def stop(self, *signals: signal.Signals) -> int:
        """Signal it (SIGTERM), and its exit code once it has ended."""
        assert self.process is not None
        if self.process.poll() is None:
            self.tree()
            for number in signals or (signal.SIGTERM,):
                self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Its exit code, once it has ended and all that it said is heard."""
        assert self.process is not None
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"vllmd does not end:\n{self.said[-4000:]}") from None
        self._ears[-1].join(LIMIT)
        return code

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stderr is not None
        with process.stderr:
            for raw in process.stderr:
                text = raw.decode(errors="replace")
                with self._heard:
                    self.said += text
                    if text.startswith("{"):
                        self.lines.append(json.loads(text))
                    self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def hear(self, what: Until, after: int = 0) -> Model:
        """The first line of its log, from number `after` on, that is so; waits for it."""
        end = time.monotonic() + LIMIT
        with self._heard:
            while True:
                for line in self.lines[after:]:
                    if what(line):
                        return line
                alive = self._ears[-1].is_alive()
                assert alive and self._heard.wait(max(0.0, end - time.monotonic())), f"never said:\n{self.said}"

    def close(self) -> None:
        """End everything and see that nothing is left: no process, socket, scratch directory, shared memory."""
        try:
            if self.process is not None and self.process.poll() is None:
                assert self.stop(signal.SIGTERM, signal.SIGTERM) == self.exit_code, self.said[-4000:]
            left = find(self.mark)
            for process in left:
                os.kill(process.pid, signal.SIGKILL)
            assert left == []
            shm = sorted(str(path) for path in self._seen_shm if path.exists())
            assert shm == []
            if self.runtime.exists():
                found = [str(path) for path in self.runtime.rglob("*") if path.is_socket() or path.is_file()]
                assert found == []
            assert "internal error" not in self.said, self.said[-6000:]
            assert "Traceback" not in self.said, self.said[-6000:]
        finally:
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            shutil.rmtree(self.runtime, ignore_errors=True)

    def story(self) -> str:
        """What it has logged last."""
        return "\n" + self.said[-3000:]

    def tree(self, name: str = "") -> list[Process]:
        """The live processes of a model, or of all."""
        found = find(f"{self.mark}:{name}:" if name else self.mark)
        try:
            self._seen_shm |= shared_memory(found)
        except OSError:
            pass  # one of them has just ended
        return found

    def reload(self) -> tuple[int, Model]:
        """Write the configuration and have it read: HTTP status and the answer."""
        self.write()
        response, raw = self.client.fetch("POST", "/api/v1/reload", {})
        answer = json.loads(raw)
        return response.status, answer.get("error", answer)

    def ctl(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run vllmctl to its end."""
        return subprocess.run(
            [sys.executable, "-m", "vllmd.ctl", "--socket", self.socket, *words], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=LIMIT, check=False,
            env=self._environment() | {"COLUMNS": "200"},
        )  # fmt: skip


@pytest.fixture(scope="session")
def fake_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment with the fake in vLLM's place."""
    return install(tmp_path_factory.mktemp("venv") / "fake")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, tiny."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def vllmd(tmp_path: Path, fake_vllm: Path, weights: Path) -> Iterator[Vllmd]:
    """A daemon to be configured and started, ended and checked after the test."""
    daemon = Vllmd(tmp_path, fake_vllm, weights)
    yield daemon
    daemon.close()


@pytest.fixture
def neighbour() -> Iterator["subprocess.Popen[bytes]"]:
    """A process like an engine, but of another daemon."""
    env = {"VLLMD_COOKIE": "vllmd-0123456789ab:a:1", "PATH": os.environ["PATH"]}
    with subprocess.Popen(["sleep", "600"], env=env, start_new_session=True) as process:
        yield process
        process.kill()
