"""The fake engine keeps the promises that other tests build on: vLLM's tree, signals, exits and words."""

import ast
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake.environment import install
from tests.fake.make_model import make_model

LIMIT_S = 10.0
SCRIPT = Path(__file__).parent / "fake/fakevllm.py"


class Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=LIMIT_S)
        self.path = path

    def connect(self) -> None:
        """To the socket, whatever the host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Fake:
    """A running fake on a unix socket with its log."""

    def __init__(self, folder: Path, model: str, *flags: str, command: tuple[str, ...] = (), **env: str) -> None:
        self.socket, self.log = folder / "s", folder / "log"
        words = [*(command or (sys.executable, str(SCRIPT))), "serve", model, "--uds", str(self.socket), *flags]
        environment = os.environ | {"FAKE_START_S": "0", "FAKE_TOTAL": str(1 << 30)} | env
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """One request's status and body."""
        connection = Unix(self.socket)
        try:
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def text(self) -> str:
        """All that it has said."""
        return self.log.read_text(errors="replace")

    def group(self) -> dict[str, psutil.Process]:
        """The living of its process group by comm."""
        found = {}
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found[Path(f"/proc/{process.pid}/comm").read_text().strip()] = process
            except (ProcessLookupError, FileNotFoundError, psutil.NoSuchProcess):
                continue
        return found

    def ready(self) -> "Fake":
        """Wait until it serves."""
        until(lambda: "Application startup complete." in self.text(), self)
        return self

    def exit(self) -> int:
        """Wait for the leader's exit code."""
        return self.process.wait(LIMIT_S)

    def end(self) -> None:
        """Leave nothing."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(LIMIT_S)


def until(holds: Callable[[], object], fake: Fake | None = None) -> None:
    """Wait for a condition, with its log in the complaint."""
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, fake.text() if fake else "it never came"
        threading.Event().wait(0.005)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Fake]]:
    """Starts fakes, ends them."""
    fakes: list[Fake] = []

    def run(model: str = "org/model", *flags: str, **options: Any) -> Fake:
        folder = tmp_path / str(len(fakes))
        folder.mkdir()
        fakes.append(Fake(folder, model, *flags, **options))
        return fakes[-1]

    yield run
    for fake in fakes:
        fake.end()


def chat(**more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"messages": [{"role": "user", "content": "say it"}], "max_tokens": 4} | more


def test_serves_and_ends_clean(start: Callable[..., Fake]) -> None:
    """It answers under its served name and exits 0 at SIGTERM with its whole group."""
    fake = start("org/model", "--served-model-name", "m", "--max-model-len", "64").ready()

    card = json.loads(fake.ask("/v1/models")[1])["data"][0]
    assert (card["id"], card["root"], card["max_model_len"]) == ("m", "org/model", 64)
    assert json.loads(fake.ask("/v1/chat/completions", chat(model="m"))[1])["usage"]["completion_tokens"] == 4
    assert fake.ask("/v1/completions", {"model": "x", "prompt": "a"})[0] == 404
    assert fake.ask("/v1/completions", {"prompt": "a", "max_tokens": 64})[0] == 400
    assert b'vllm:generation_tokens_total{engine="0",model_name="m"} 4.0' in fake.ask("/metrics")[1]
    assert {"python", "VLLM::EngineCor", "VLLM::Worker"} <= set(fake.group())
    assert fake.group()["VLLM::EngineCor"].cmdline()[0] == "VLLM::EngineCore"

    fake.process.terminate()
    assert fake.exit() == 0
    until(lambda: not fake.group(), fake)


def test_stream_is_sse(start: Callable[..., Fake]) -> None:
    """A stream is one event a token, usage where asked for, and [DONE]."""
    fake = start().ready()

    body = fake.ask("/v1/chat/completions", chat(stream=True, stream_options={"include_usage": True}))[1]
    events = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks[:-1]) == "the quick brown fox"
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 4


def test_phases_are_in_order(start: Callable[..., Fake]) -> None:
    """The lines that mark the phases come in vLLM's shape and order, the KV size from the flag."""
    text = start("org/model", "--kv-cache-memory-bytes", "1M").ready().text()

    marks = [
        "non-default args: ", "Resolved architecture: ", "Initializing a V1 LLM engine", "world_size=1 rank=0",
        "Starting to load model", "Completed | 1/1", "Loading weights took", "Warming up model",
        "CPU KV cache size: 2,048 tokens", "init engine (profile", "Starting vLLM server on", "startup complete",
    ]  # fmt: skip
    places = [text.index(mark) for mark in marks]
    assert sorted(places) == places
    assert re.search(r"^\(Worker pid=\d+\) INFO \d\d-\d\d \d\d:\d\d:\d\d \[\w+\.py:\d+\] ", text, re.M)


def test_stopped_engine_hangs_but_health_lies(start: Callable[..., Fake]) -> None:
    """SIGSTOP of the engine leaves /health at 200 and completions without an answer; SIGCONT brings it."""
    fake = start().ready()
    engine = fake.group()["VLLM::EngineCor"]
    engine.suspend()
    answers: list[int] = []
    asker = threading.Thread(target=lambda: answers.append(fake.ask("/v1/chat/completions", chat())[0]))
    asker.start()

    assert fake.ask("/health")[0] == 200
    asker.join(0.2)
    assert not answers
    engine.resume()
    asker.join(LIMIT_S)
    assert answers == [200]


@pytest.mark.parametrize("victim", ["VLLM::EngineCor", "VLLM::Worker"])
def test_child_death_ends_all_with_zero(start: Callable[..., Fake], victim: str) -> None:
    """SIGKILL of engine or worker: 503, open streams end in an error event, exit 0, nobody left."""
    fake = start(FAKE_TOKENS_PER_S="1").ready()
    bodies: list[bytes] = []
    asker = threading.Thread(target=lambda: bodies.append(fake.ask("/v1/chat/completions", chat(stream=True))[1]))
    asker.start()
    until(lambda: b'num_requests_running{engine="0",model_name="org/model"} 1.0' in fake.ask("/metrics")[1])
    until(lambda: b'generation_tokens_total{engine="0",model_name="org/model"} 1.0' in fake.ask("/metrics")[1])

    fake.group()[victim].kill()
    until(lambda: fake.ask("/health")[0] == 503)
    assert fake.exit() == 0
    asker.join(LIMIT_S)
    assert b'"error"' in bodies[0] and bodies[0].endswith(b"data: [DONE]\n\n")
    assert "EngineDeadError" in fake.text()
    assert ("died unexpectedly (exit code: -9)" in fake.text()) == (victim == "VLLM::Worker")
    until(lambda: not fake.group(), fake)


def test_engine_outlives_the_leader(start: Callable[..., Fake]) -> None:
    """SIGKILL of the leader leaves engine and worker as orphans, and nobody holds its socket."""
    fake = start().ready()

    fake.process.kill()
    fake.exit()
    assert {"VLLM::EngineCor", "VLLM::Worker"} <= set(fake.group())
    with pytest.raises(ConnectionRefusedError):
        fake.ask("/health")


def test_drain_finishes_what_runs(start: Callable[..., Fake]) -> None:
    """With --shutdown-timeout SIGTERM lets running requests finish, refuses new ones with 500, then exits 0."""
    fake = start("org/model", "--shutdown-timeout", "9", FAKE_TOKENS_PER_S="8").ready()
    answers: list[int] = []
    asker = threading.Thread(target=lambda: answers.append(fake.ask("/v1/chat/completions", chat())[0]))
    asker.start()
    until(lambda: b'num_requests_running{engine="0",model_name="org/model"} 1.0' in fake.ask("/metrics")[1])

    fake.process.terminate()
    until(lambda: "mode=drain" in fake.text(), fake)
    assert fake.ask("/health")[0] == 200
    assert fake.ask("/v1/chat/completions", chat())[0] == 500
    assert fake.exit() == 0
    asker.join(LIMIT_S)
    assert answers == [200]


def test_drain_cap_leaves_the_leader_hanging(start: Callable[..., Fake]) -> None:
    """A cap hit with a request left kills the engine; the leader waits on until its client goes."""
    fake = start("org/model", "--shutdown-timeout", "0.1", FAKE_TOKENS_PER_S="0.1").ready()
    connection = Unix(fake.socket)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat()))
    until(lambda: b'num_requests_running{engine="0",model_name="org/model"} 1.0' in fake.ask("/metrics")[1])

    fake.process.terminate()
    until(lambda: "VLLM::EngineCor" not in fake.group(), fake)
    assert fake.process.poll() is None
    connection.close()
    assert fake.exit() == 0


def test_sleeping_engine_answers_after_wake_up(start: Callable[..., Fake]) -> None:
    """In dev mode a request to a sleeping engine hangs until /wake_up, and the worker's memory is back meanwhile."""
    fake = start(VLLM_SERVER_DEV_MODE="1", FAKE_MEMORY=str(64 << 20)).ready()
    worker = fake.group()["VLLM::Worker"]
    assert fake.ask("/sleep?level=1", {})[0] == 200
    assert json.loads(fake.ask("/is_sleeping")[1]) == {"is_sleeping": True}
    until(lambda: worker.memory_info().rss < 64 << 20, fake)
    answers: list[int] = []
    asker = threading.Thread(target=lambda: answers.append(fake.ask("/v1/chat/completions", chat())[0]))
    asker.start()
    asker.join(0.1)
    assert not answers

    assert fake.ask("/wake_up", {})[0] == 200
    asker.join(LIMIT_S)
    assert answers == [200]


def test_level_2_drops_the_weights_until_they_are_loaded_again(start: Callable[..., Fake]) -> None:
    """Woken without reload_weights it answers garbage, and it serves once all tags are awake."""
    fake = start(VLLM_SERVER_DEV_MODE="1").ready()

    def said() -> str:
        status, body = fake.ask("/v1/completions", {"model": "org/model", "prompt": "a", "max_tokens": 3})
        assert status == 200
        return str(json.loads(body)["choices"][0]["text"])

    before = said()
    assert fake.ask("/sleep?level=2&mode=wait", {})[0] == 200
    assert fake.ask("/wake_up", {})[0] == 200
    assert said() != before
    assert fake.ask("/sleep?level=2&mode=wait", {})[0] == 200
    assert fake.ask("/wake_up?tags=weights", {})[0] == 200
    assert json.loads(fake.ask("/is_sleeping")[1]) == {"is_sleeping": True}
    assert fake.ask("/collective_rpc", {"method": "reload_weights"})[0] == 200
    assert fake.ask("/wake_up?tags=kv_cache", {})[0] == 200
    assert json.loads(fake.ask("/is_sleeping")[1]) == {"is_sleeping": False}
    assert said() == before


def test_gone_client_aborts(start: Callable[..., Fake]) -> None:
    """A client that hangs up frees its place at once."""
    fake = start(FAKE_TOKENS_PER_S="0.1").ready()
    connection = Unix(fake.socket)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat()))
    until(lambda: b'num_requests_running{engine="0",model_name="org/model"} 1.0' in fake.ask("/metrics")[1])

    connection.close()
    until(lambda: b'num_requests_running{engine="0",model_name="org/model"} 0.0' in fake.ask("/metrics")[1])


def test_term_is_swallowed_while_starting(start: Callable[..., Fake]) -> None:
    """SIGTERM after the imports does not stop a start; the next one, once it serves, does. SIGINT ends a start."""
    fake, other = start(FAKE_START_S="0.6"), start(FAKE_STALL_AT="load")
    until(lambda: "Initializing a V1" in fake.text(), fake)
    fake.process.terminate()
    until(lambda: "world_size" in other.text(), other)
    other.process.send_signal(signal.SIGINT)
    assert other.exit() == -signal.SIGINT
    until(lambda: not other.group(), other)

    fake.ready().process.terminate()
    assert fake.exit() == 0


def test_port_is_taken_only_by_a_listener(start: Callable[..., Fake]) -> None:
    """On TCP it refuses a port where somebody listens, and listens itself only at the end of its start."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        second = start("org/model", "--uds", "", "--host", "127.0.0.1", "--port", port)
        assert second.exit() == 1
        assert "Address already in use" in second.text()
    third = start("org/model", "--uds", "", "--host", "127.0.0.1", "--port", port, FAKE_STALL_AT="http")
    until(lambda: "init engine" in third.text(), third)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))


WORDS = {
    "kv": "estimated maximum model length is 1024", "path": "HFValidationError", "arch": "are not supported for now",
    "package": "not found in your environment: verovio", "oom": "torch.OutOfMemoryError: CUDA out of memory",
    "free": "less than desired GPU memory utilization", "profiling": "Error in memory profiling",
    "gated": "You are trying to access a gated repo", "port": "Address already in use",
}  # fmt: skip


@pytest.mark.parametrize("fault", WORDS)
def test_failing_start(start: Callable[..., Fake], fault: str) -> None:
    """FAKE_FAIL ends the start with exit 1, the cause in vLLM's words, the generic line last for the engine's."""
    fake = start(FAKE_FAIL=fault)

    assert fake.exit() == 1
    text = fake.text()
    assert WORDS[fault] in text
    inner = fault in ("kv", "oom", "free", "profiling")
    assert inner == ("Failed core proc(s): {}" in text[text.index(WORDS[fault]) :])
    until(lambda: not fake.group(), fake)


def test_natural_refusals(start: Callable[..., Fake], tmp_path: Path) -> None:
    """Unknown flags exit 2; a missing path, too long a context and too small a cache exit 1."""
    model = str(make_model(tmp_path / "model", max_len=4096))
    flag = start(model, "--no-such-flag")
    path = start("/nonexistent/model")
    long = start(model, "--max-model-len", "5000")
    small = start(model, "--kv-cache-memory-bytes", str(512 * 1000), "--max-model-len", "2k")
    large = start(model, "--kv-cache-memory-bytes", "2G")
    auto = start(model, "--kv-cache-memory-bytes", str(512 * 1000), "--max-model-len", "auto").ready()

    assert [fake.exit() for fake in (flag, path, long, small, large)] == [2, 1, 1, 1, 1]
    assert "vllm: error: unrecognized arguments: --no-such-flag" in flag.text()
    assert "'/nonexistent/model'" in path.text()
    assert "requested memory for kv (2.0 GiB). Decrease --kv-cache-memory-bytes" in large.text()
    assert "User-specified max_model_len (5000) is greater" in long.text()
    assert "the estimated maximum model length is 1000." in small.text()
    assert json.loads(auto.ask("/v1/models")[1])["data"][0]["max_model_len"] == 1000


def test_faults_after_ready(start: Callable[..., Fake], tmp_path: Path) -> None:
    """Memory is resident, an escapee is out of the group, an asked-for exit comes once, SIGTERM can be ignored."""
    fake = start(FAKE_MEMORY=str(64 << 20), FAKE_WORKERS="2", FAKE_IGNORE_TERM="1").ready()
    workers = [fake.group()[f"VLLM::Worker_TP{n}"[:15]] for n in (0, 1)]
    assert all(worker.memory_info().rss > 64 << 20 for worker in workers[:1])
    fake.process.terminate()
    assert fake.ask("/health")[0] == 200

    escaping = start(FAKE_ESCAPE="1", FAKE_EXIT_AFTER="0:7", FAKE_ONCE=str(tmp_path / "once"))
    assert escaping.exit() == 7
    found = [p for p in psutil.process_iter() if p.name() == "fake-escapee" and str(tmp_path) in str(p.environ())]
    assert len(found) == 1 and os.getsid(found[0].pid) != escaping.process.pid
    found[0].kill()
    start(FAKE_EXIT_AFTER="0:7", FAKE_ONCE=str(tmp_path / "once")).ready().ask("/health")


def test_environment_looks_like_vllm(start: Callable[..., Fake], tmp_path: Path) -> None:
    """install() gives a command that serves, and flags and version that can be read without an import."""
    command = install(tmp_path / "env")
    site = next((tmp_path / "env/lib").glob("python3*/site-packages"))

    classes = ast.parse((site / "vllm/engine/arg_utils.py").read_text()).body
    fields = [n.target.id for c in classes if isinstance(c, ast.ClassDef) for n in c.body
              if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]  # fmt: skip
    assert {"max_model_len", "gpu_memory_utilization", "enforce_eager"} < set(fields)
    assert "Version: 0.32.0+cpu" in (site / "vllm-0.32.0+cpu.dist-info/METADATA").read_text()
    fake = start(command=(str(command),)).ready()
    assert "vllm" in fake.group()


def test_model_folder_has_a_true_header(tmp_path: Path) -> None:
    """The safetensors header accounts for every byte, and weights_bytes is met exactly without taking disk."""
    file = make_model(tmp_path / "m", weights_bytes=6 << 30) / "model.safetensors"

    with file.open("rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        header = json.loads(data.read(length))
    end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    assert (6 << 30, (6 << 30) + 8 + length) == (end, file.stat().st_size)
    assert file.stat().st_blocks * 512 < 1 << 20
