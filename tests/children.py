"""Children for the tests of the process edges: Python one-liners that behave as engines do, or worse.

Their standard output is a pipe that all of them inherit, so its end of file proves that none is left.
"""

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from vllmd.edge.kill import kill_tree
from vllmd.edge.process import Child, become_subreaper, spawn
from vllmd.facts import Launch

LIMIT = 20.0  # seconds; far above what anything here needs

HELPERS = """
import os, signal, sys, time
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def title(name): open("/proc/self/comm", "w").write(name)
def child(body):
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(r)
        body(lambda: os.close(w))
        signal.pause()
        os._exit(0)
    os.close(w); os.read(r, 1); os.close(r)
    return pid
def engine(ready): title("VLLM::EngineCor"); ready()
def stubborn(ready):
    os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); ready()
def runaway(ready):
    os.setsid()
    if os.fork(): os._exit(0)
    ready()
def stay():
    say("up")
    while True: signal.pause()
"""


@dataclass
class Engine:
    """A spawned child and what it prints."""

    child: Child
    reader: asyncio.StreamReader
    transport: asyncio.BaseTransport

    async def line(self) -> str:
        return (await asyncio.wait_for(self.reader.readline(), LIMIT)).decode().strip()

    async def until_up(self) -> "Engine":
        assert await self.line() == "up"
        return self

    async def nobody_left(self) -> bool:
        """Whether all who could write have ended; what they still wrote is dropped."""
        await asyncio.wait_for(self.reader.read(), LIMIT)
        return self.reader.at_eof()


Start = Callable[..., Awaitable[Engine]]


def make_launch(code: str, tmp_path: Path, **changes: object) -> Launch:
    values: dict[str, object] = {
        "argv": (sys.executable, "-I", "-S", "-c", HELPERS + code), "env": {}, "endpoint": "http://127.0.0.1:1",
        "served_name": "m", "scratch": "", "cookie": f"test-{uuid4().hex}",
    }  # fmt: skip
    return Launch(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    running: list[Engine] = []

    async def begin(code: str, cgroup: Path | None = None, **changes: object) -> Engine:
        read, write = os.pipe()
        try:
            child = spawn(make_launch(code, tmp_path, **changes), log_fd=write, cwd=tmp_path, cgroup=cgroup)
        finally:
            os.close(write)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb", 0)
        )
        running.append(Engine(child, reader, transport))
        return running[-1]

    yield begin
    for engine in running:
        if engine.child.pidfd >= 0:
            assert await kill_tree(engine.child) == ()
            engine.child.close()
        engine.transport.close()


@pytest.fixture
def subreaper() -> Iterator[None]:
    assert become_subreaper()
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    """A process of somebody else: its own session, no cookie, and there before any engine."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # as exactly as the kernel tells when a process began
        yield process
        process.kill()


async def wait_for(condition: Callable[[], object]) -> None:
    """Until it holds; for what only /proc shows."""
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0)
