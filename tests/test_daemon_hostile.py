"""Clients and engines that mean harm, against the real daemon with a model running: it is up, the model untouched."""

import asyncio
import os
import random
import sys
import time
from pathlib import Path

import pytest

from tests.daemon import LIMIT, Vllmd, fake_vllm, vllmd, weights
from tests.e2e.chat import answers
from tests.test_hostile_clients import FIXED, spoil
from vllmd.ctl.client import Client
from vllmd.ctl.faults import Unreachable

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures
AT_ONCE = 100
QUIET = 0.25  # seconds without a byte, after which a request that is not complete gets no answer


async def harm(daemon: Vllmd, port: int, data: bytes) -> bytes:
    """Send it to the socket, or to `port`; what came back until it fell silent, then hang up."""
    connection = asyncio.open_connection("127.0.0.1", port) if port else asyncio.open_unix_connection(daemon.socket)
    reader, writer = await connection
    got = b""
    try:
        writer.write(data)
        while chunk := await asyncio.wait_for(reader.read(1 << 16), QUIET):
            got += chunk
    except (ConnectionError, TimeoutError):
        pass
    finally:
        writer.transport.abort()
    return got


@pytest.mark.parametrize("listener", ["unix", "tcp"])
def test_a_thousand_malformed_requests(vllmd: Vllmd, listener: str) -> None:
    """Nobody gets 500, nothing is logged as an error, and the model has the pids it had."""
    vllmd.http["listen"] = ["127.0.0.1:0"]
    vllmd.model("a").model("alpha").start()
    (a,) = vllmd.up("a")
    (address,) = vllmd.hear(lambda line: line["event"] == "vllmd is ready")["web"]
    port = int(address.rpartition(":")[2]) if listener == "tcp" else 0
    rng = random.Random(7)
    requests = FIXED + [spoil(rng) for _ in range(1000 - len(FIXED))]

    async def all_of_them() -> list[bytes]:
        answers = []
        for start in range(0, len(requests), AT_ONCE):
            answers += await asyncio.gather(*(harm(vllmd, port, data) for data in requests[start : start + AT_ONCE]))
            assert (await asyncio.to_thread(vllmd.look, "a"))["state"] == "ready"
        return answers

    answered = 0
    for data, got in zip(requests, asyncio.run(all_of_them()), strict=True):
        statuses = [line[9:12] for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.")]
        assert not any(status.startswith(b"5") for status in statuses), data[:200]
        answered += bool(statuses)
    assert answered > 500  # the others are not complete
    now = vllmd.look("a")
    assert (now["state"], now["pids"], now["attempt"]) == ("ready", a["pids"], 1)
    assert answers(now)
    assert [line for line in vllmd.lines if line["level"] == "error"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_peer_without_rights_cannot_use_the_socket(vllmd: Vllmd) -> None:
    """Another user is refused by the socket's mode, and is told what to do."""
    vllmd.model("a").start()
    (a,) = vllmd.up("a")
    vllmd.runtime.chmod(0o755)
    assert vllmd.socket.stat().st_mode & 0o777 == 0o660
    client = Client(str(vllmd.socket), LIMIT)
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        with pytest.raises(Unreachable, match="permission denied"):
            client.post("/api/v1/models/a/stop")
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
    assert vllmd.look("a")["pids"] == a["pids"]


def test_tcp_may_look_and_not_touch(vllmd: Vllmd) -> None:
    """GET is answered, POST is 403 and does nothing."""
    vllmd.http["listen"] = ["127.0.0.1:0"]
    vllmd.model("a").start()
    vllmd.up("a")
    (address,) = vllmd.hear(lambda line: line["event"] == "vllmd is ready")["web"]
    port = int(address.rpartition(":")[2])
    head = b"%s /api/v1/%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    assert asyncio.run(harm(vllmd, port, head % (b"GET", b"status"))).startswith(b"HTTP/1.1 200")
    assert asyncio.run(harm(vllmd, port, head % (b"POST", b"models/a/stop"))).startswith(b"HTTP/1.1 403")
    assert vllmd.look("a")["state"] == "ready"


def test_hostile_output_of_an_engine_stays_in_its_log(vllmd: Vllmd) -> None:
    """Escapes, NUL, bytes that are no UTF-8, a line of a megabyte: shown without harm, and the model goes on."""
    vllmd.model("a", {"hostile_log": 1, "lines": 3}).start()
    (a,) = vllmd.up("a")
    log = vllmd.log_dir / "a.log"
    vllmd.wait("a", lambda _: b"no end" in log.read_bytes())
    for path in ("/api/v1/status", "/api/v1/models/a/logs?follow=0&n=50", "/api/v1/events?follow=0"):
        raw = vllmd.client.fetch("GET", path)[1]
        assert b"\x1b" not in raw and b"\\u001b" not in raw and b"\\u0000" not in raw, path
        assert max(map(len, raw.splitlines())) < 100_000, path
    shown = vllmd.ctl("logs", "a")
    assert "red" in shown.stdout and "\x1b" not in shown.stdout and "\0" not in shown.stdout
    assert answers(a)
    os.kill(a["pid"], 9)
    crashed = vllmd.wait("a", "backoff")  # its cause is looked for in that log
    assert "\x1b" not in crashed["why"]["text"] and len(crashed["why"]["text"]) < 1000
    vllmd.wait("a", "ready")


def test_a_talkative_engine_is_kept_small(vllmd: Vllmd) -> None:
    """Its log is rotated at log_size, log_keep older parts stay, and the last lines are there."""
    vllmd.daemon |= {"log_size": "64KiB", "log_keep": 2}
    vllmd.model("a", {"lines": 20_000}).start()
    (a,) = vllmd.up("a")

    def rotated(_: object) -> bool:
        sizes = [path.stat().st_size for path in vllmd.log_dir.glob("a.log*")]
        return (vllmd.log_dir / "a.log.1").exists() and (vllmd.log_dir / "a.log").stat().st_size < 64 << 10 < sum(sizes)

    vllmd.wait("a", rotated)
    kept = sorted(path.name for path in vllmd.log_dir.iterdir() if path.name.startswith("a.log"))
    assert set(kept) <= {"a.log", "a.log.1", "a.log.2"}
    assert b"19999.0 tokens/s" in b"".join((vllmd.log_dir / name).read_bytes() for name in kept)
    assert answers(a)
    assert vllmd.look("a")["pids"] == a["pids"]


def size(path: Path) -> int:
    """Of a file that may be moved meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@pytest.mark.parametrize("fake", [{}, {"stall_at": "load"}], ids=["ready", "starting"])
def test_a_flood_of_output_is_bounded_and_holds_up_nobody(vllmd: Vllmd, fake: dict[str, str]) -> None:
    """Twenty megabytes a second, from a ready engine or while it starts: the daemon answers, the disk does not fill up."""
    wrapper = vllmd.folder / "vllm"
    line = "(EngineCore_DP0 pid=12) INFO 11-24 01:42:29 [core.py:1] " + "x" * 140 + "\\n"
    flood = f"import os, time\nd = b'{line}' * 2000\nwhile True: os.write(1, d); time.sleep(0.02)"
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} -I -S -c "{flood}" &\nexec {vllmd.defaults["executable"]} "$@"\n')
    wrapper.chmod(0o755)
    vllmd.daemon |= {"log_size": "4MiB", "log_keep": 2}
    vllmd.model("a", fake, executable=wrapper).start()
    vllmd.act("start", "a")
    vllmd.wait("a", "starting" if fake else "ready")
    slowest, largest = 0.0, 0
    end = time.monotonic() + 4.0
    while time.monotonic() < end:
        began = time.monotonic()
        assert vllmd.client.fetch("GET", "/healthz")[0].status == 200
        slowest = max(slowest, time.monotonic() - began)
        largest = max([largest, *map(size, vllmd.log_dir.iterdir())])
    assert slowest < 1.0
    assert largest < 40 << 20  # log_size, and what comes in a second; all of it is twice as much
    assert (vllmd.log_dir / "a.log.2").exists()
    vllmd.act("stop", "a", now=True)
    vllmd.wait("a", "stopped")


def test_a_name_that_leaves_its_directory_is_not_a_model(vllmd: Vllmd) -> None:
    """Paths in a model's place: 404, and no file is read."""
    vllmd.model("a").start()
    for name in ("..%2f..%2fetc%2fpasswd", "%00", "a%2f..%2fa"):
        assert vllmd.client.fetch("GET", f"/api/v1/models/{name}/logs?follow=0")[0].status == 404


def test_a_secret_that_an_engine_prints_is_shown_nowhere(vllmd: Vllmd) -> None:
    """One under a telling name, one that the configuration filled in, one in an address: not in logs, why, status, events
    or the daemon's own log. Who may only look sees no value of its environment at all."""
    secrets = ["hf_abcdefghijk", "filled-in-by-env", "my-proxy-password"]
    vllmd.environment["FILLED"] = secrets[1]
    wrapper = vllmd.folder / "vllm"
    words = "$HF_TOKEN $ODD $PROXY"
    wrapper.write_text(
        f'#!/bin/sh\necho "starting with {words}"\n[ -e {vllmd.folder}/once ] && exec {vllmd.defaults["executable"]} "$@"\n'
        f'touch {vllmd.folder}/once; echo "Traceback (most recent call last):"; echo "AuthError: {words}"; exit 1\n'
    )
    wrapper.chmod(0o755)
    vllmd.http["listen"] = ["127.0.0.1:0"]
    env = {
        "HF_TOKEN": secrets[0],
        "ODD": "${env:FILLED}",
        "PROXY": f"http://me:{secrets[2]}@proxy:3128",
        "PLAIN": "x-y-z",
    }
    vllmd.model("a", executable=wrapper, env=env).start()
    vllmd.act("start", "a")
    failed = vllmd.wait("a", "backoff")
    assert "AuthError: (hidden) (hidden) http://(hidden)@proxy:3128" in failed["why"]["text"]
    vllmd.wait("a", "ready")
    paths = ("status", "models/a", "models/a/why", "models/a/logs", "models/a/logs?failed=1", "events?follow=0")
    shown = {path: vllmd.client.fetch("GET", f"/api/v1/{path}")[1].decode() for path in paths}
    assert "starting with (hidden) (hidden) http://(hidden)@proxy:3128" in shown["models/a/logs"]
    assert "x-y-z" in shown["models/a"]
    (address,) = vllmd.hear(lambda line: line["event"] == "vllmd is ready")["web"]
    port = int(address.rpartition(":")[2])
    head = b"GET /api/v1/models/a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    shown["over TCP"] = asyncio.run(harm(vllmd, port, head)).decode()
    assert "HF_TOKEN" in shown["over TCP"] and "x-y-z" not in shown["over TCP"]
    shown["own log"] = vllmd.said
    assert {path: secret for path, text in shown.items() for secret in secrets if secret in text} == {}
