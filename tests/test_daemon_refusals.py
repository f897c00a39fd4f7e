"""Starts that cannot succeed: one line of cause with its remedy, the same in the answer, status, `why` and the log."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import LIMIT, Vllmd, fake_vllm, vllmd, weights
from tests.fake.make_model import make_model

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures

# FAKE_FAIL -> class, words of the sentence, words of a remedy, whether it is tried again
FAILURES = {
    "kv": ("kv-too-small", "KV", "max_model_len", False),
    "path": ("path-wrong", "does not exist", "model", False),
    "arch": ("not-servable", "NoSuchForCausalLM", "", False),
    "package": ("package-missing", "verovio", "verovio", False),
    "gated": ("gated", "licence", "HF_TOKEN", False),
    "oom": ("out-of-memory", "130.00 MiB", "", False),
    "free": ("memory-taken", "3.02", "", True),
    "profiling": ("memory-moved", "", "", True),
    "port": ("port-taken", "port", "", True),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_a_failed_start_says_why_and_is_retried_only_if_that_can_help(vllmd: Vllmd, fault: str) -> None:
    """Class, sentence, remedy from the log; attempts stop at one for what cannot heal, at max_failures else."""
    kind, text, remedy, again = FAILURES[fault]
    vllmd.defaults["restart"] |= {"max_failures": 3}
    vllmd.model("a", {"fail": fault}).start()
    vllmd.act("start", "a")
    failed = vllmd.wait("a", "failed")
    why = failed["why"]
    assert why["class"] == kind
    assert text in why["text"] and "\n" not in why["text"]
    assert len(why["short"]) <= 24
    assert any(remedy in each["text"] for each in why["remedies"])
    assert failed["attempt"] == (3 if again else 1)
    assert failed["reserved"] == 0
    told = vllmd.why("a")
    assert (told["why"]["text"], told["heals"]) == (why["text"], again)
    assert any(line.get("model") == "a" and text in line["event"] for line in vllmd.lines)
    assert why["text"] in vllmd.ctl("why", "a").stdout
    assert vllmd.client.fetch("GET", "/api/v1/models/a/logs?failed=1")[0].status == 200


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    "flag": ({"args": {"enforce-eeger": True}}, "enforce-eeger"),
    "executable": ({"executable": "/nowhere/vllm"}, "/nowhere/vllm"),
    "kv_cache": ({"kv_cache": "1MiB", "max_model_len": 2048, "model": "BIG"}, "kv_cache is 1 MiB"),
    "vram": ({"vram": "64MiB"}, "vram"),
    "context": ({"max_model_len": 4096}, "2048"),
    "too big": ({"vram": "9000GiB"}, "whole budget"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_start_is_refused_within_a_second(vllmd: Vllmd, case: str) -> None:
    """422 with the cause and a remedy; failed, nothing was run, nothing is tried again."""
    keys, text = IMPOSSIBLE[case]
    if keys.get("model") == "BIG":
        keys = keys | {"model": make_model(vllmd.folder / "big", layers=32, hidden=512)}
    vllmd.devices = {}
    vllmd.model("a", **keys).start()
    began = time.monotonic()
    code, error = vllmd.act("start", "a")
    assert time.monotonic() - began < 1.0
    assert code == 422, error
    assert text in error["message"] and error["message"].startswith("cannot start a: ")
    assert error["remedies"]
    failed = vllmd.look("a")
    assert (failed["state"], failed["attempt"], failed["reserved"]) == ("failed", 1, 0)
    assert failed["why"]["text"] == error["message"]
    assert failed["deadline_s"] is None
    assert vllmd.tree() == []
    assert not (vllmd.log_dir / "a.log").exists()


def test_what_does_not_fit_now_is_refused_with_the_sum(vllmd: Vllmd) -> None:
    """409: need, room, who has it, what would help; the model stays stopped and the others run on."""
    vllmd.devices["limit"] = "3GiB"
    vllmd.model("a").model("b", vram="2GiB").start()
    (a,) = vllmd.up("a")
    code, error = vllmd.act("start", "b")
    assert code == 409
    for part in ("needs 2.0 GiB on cpu", "1.5 of 3.0 GiB left", "a 1.5 GiB", "stop a"):
        assert part in error["message"]
    assert vllmd.look("b")["state"] == "stopped"
    assert vllmd.look("a")["pids"] == a["pids"]
    vllmd.act("stop", "a")
    assert vllmd.act("start", "b")[0] == 202  # memory that is on its way counts
    assert vllmd.wait("b", "ready")["reserved"] == 2 << 30


class Stranger(ThreadingHTTPServer):
    """Somebody else's server, in this process: 200 to all, and it even says that it serves `a`."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        self.heard = threading.Condition()
        super().__init__(("127.0.0.1", port), Answer)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def wait_asked(self, path: str, times: int) -> None:
        with self.heard:
            assert self.heard.wait_for(lambda: self.asked.count(path) >= times, LIMIT), self.asked


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Stranger)
        body = json.dumps({"object": "list", "data": [{"id": "a", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        with server.heard:
            server.asked.append(self.path)
            server.heard.notify_all()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class has named it
        """Say nothing."""


@pytest.fixture
def strangers() -> Iterator[Any]:
    running: list[Stranger] = []

    def begin(port: int) -> Stranger:
        running.append(Stranger(port))
        return running[-1]

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_that_a_stranger_has_is_refused_naming_him(vllmd: Vllmd, strangers: Any) -> None:
    """Before anything is started; the stranger is let be."""
    server = strangers(0)
    port = server.server_address[1]
    vllmd.model("a", port=port).start()
    code, error = vllmd.act("start", "a")
    me = Path("/proc/self/comm").read_text().strip()
    assert code == 422
    assert f"port {port} is taken by {me} (pid " in error["message"]
    assert any('port = "auto"' in remedy for remedy in error["remedies"])
    assert server.asked == []


def test_a_stranger_who_takes_the_port_during_the_start_is_never_the_model(vllmd: Vllmd, strangers: Any) -> None:
    """He answers /health and claims the very name: as long as the socket is not our tree's, it is starting."""
    port = free_port()
    vllmd.model("a", {"stall_at": "http"}, port=port).start()
    event = vllmd.last_event()
    vllmd.act("start", "a")
    vllmd.wait("a", lambda m: m["phase"] in ("load", "measure", "compile"))
    server = strangers(port)
    server.wait_asked("/v1/models", 3)
    assert vllmd.look("a")["state"] == "starting"
    vllmd.act("stop", "a")
    vllmd.wait("a", "stopped")
    assert "ready" not in vllmd.states("a", event)
    with socket.create_connection(("127.0.0.1", port), LIMIT):
        pass  # he still serves


def test_a_port_lost_to_a_stranger_during_the_start_is_named(vllmd: Vllmd, strangers: Any) -> None:
    """The engine cannot listen: told as a taken port, not as a crash."""
    port = free_port()
    vllmd.model("a", {"start_s": 2.5}, port=port).start()
    vllmd.act("start", "a")
    vllmd.wait("a", lambda m: m["phase"] == "load")
    server = strangers(port)
    crashed = vllmd.wait("a", lambda m: m["state"] in ("backoff", "ready"))
    assert (crashed["state"], crashed["why"]["class"]) == ("backoff", "port-taken")
    failed = vllmd.wait("a", "failed")
    assert f"port {port} is taken by" in failed["why"]["text"]
    assert server.asked.count("/health") > 0
