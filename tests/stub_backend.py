"""A daemon that is a dict, and both listeners in front of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from vllmd.edge.backend import Caller, LogReader, Refused, Tallies, Verb
from vllmd.edge.gate import Limits
from vllmd.edge.http import Listeners
from vllmd.edge.stream import EventLog
from vllmd.events import Answer
from vllmd.spec import HttpSpec

GIB = 1 << 30
NO_ROOM = "cannot start big: needs 5.0 GiB on GPU 0, 1.1 of 11.4 GiB left: alpha 9.8 GiB, Xorg 0.5 GiB"


def device() -> dict[str, Any]:
    """A card with one model and a display on it."""
    return {
        "id": "GPU-1", "kind": "gpu", "index": 0, "label": "GPU 0", "name": "RTX", "total": 12 * GIB, "budget": 11 * GIB,
        "reserve": GIB, "reserved": 6 * GIB, "used": 6 * GIB, "external": GIB // 2,
        "external_processes": [{"pid": 7, "name": "Xorg", "used": GIB // 2}], "free": 4 * GIB, "silent_s": 0.5,
        "lent": 0, "lent_missing": 0, "lent_for_s": None,
    }  # fmt: skip


def model(name: str, state: str = "stopped", **more: Any) -> dict[str, Any]:
    """One row of the status."""
    row = {
        "name": name, "model": f"org/{name}", "category": ["llm"], "state": state, "wanted": False, "autostart": False,
        "pinned": False, "on_demand": True,
        "phase": None, "progress": None, "overall": None, "elapsed_s": None, "eta_s": None, "usual_s": None,
        "silent_s": None, "deadline_s": None, "since_s": 5.0, "pid": None, "pids": [], "endpoint": None, "devices": [],
        "per_device": [], "need": None, "need_measured": False, "reserved": 0, "used": 0, "attempt": 0, "restarts": 0,
        "failures": 0, "uptime_s": None, "requests_running": 0, "requests_waiting": 0, "tokens_per_s": 0.0,
        "requests_in_line": 0, "line_since_s": None, "idle_s": None, "unloads_in_s": None,
        "makes_room_for": None, "waits_for": [], "swap_test": None, "why": None,
    }  # fmt: skip
    return row | more


def full_status() -> dict[str, Any]:
    """A status in which every kind of field is set somewhere."""
    why = {
        "class": "no-room", "text": NO_ROOM, "short": "does not fit", "age_s": 3.0,
        "remedies": [{"text": "stop alpha", "action": {"method": "POST", "path": "/api/v1/models/alpha/stop"}}],
    }  # fmt: skip
    share = {"id": "GPU-1", "reserved": 6 * GIB, "used": 5 * GIB}
    return {
        "daemon": {
            "version": "1", "pid": 4, "host": "ws1", "uptime_s": 9.5,
            "http": ["http://127.0.0.1:8400"], "spare": 0, "spare_ready": False, "config": "/etc/vllmd.toml", "access": "",
            "closing": False, "trouble": "",
        },
        "devices": [device()],
        "models": [
            model("alpha", "ready", category=["ocr", "vlm"], devices=["GPU-1"], per_device=[share], reserved=6 * GIB,
                  used=5 * GIB, need=6 * GIB, requests_running=3, tokens_per_s=412.5, pid=11, pids=[11, 12]),
            model("big", "failed", why=why, need=5 * GIB),
            model("b.e-t_a", "starting", phase="load", progress=0.5, overall=0.2, waits_for=["alpha"]),
        ],
    }  # fmt: skip


class Lines(LogReader):
    """A log of given batches, one per read."""

    def __init__(self, *batches: Sequence[Mapping[str, Any]]) -> None:
        self.batches = list(batches)
        self.closed = asyncio.Event()

    async def read(self) -> Sequence[Mapping[str, Any]]:
        return self.batches.pop(0) if self.batches else []

    def close(self) -> None:
        self.closed.set()


class Stub:
    """The Backend; keeps what it was asked."""

    def __init__(self) -> None:
        self.value = full_status()
        self.is_ready = True
        self.asked: list[tuple[Any, ...]] = []
        self.changes: list[tuple[Caller, str, tuple[str, ...]]] = []
        self.faults: list[tuple[str, str, BaseException]] = []
        self.answers: dict[str, Answer] = {}
        self.lines = Lines([{"text": "one"}], [{"text": "two"}])
        self.shown = (False, 0)  # how the last log was asked for: follow, most
        self.broken: BaseException | None = None
        self.counted = Tallies()
        self.release: asyncio.Event | None = None  # set: act() waits for it
        self.cancelled = asyncio.Event()

    def ready(self) -> bool:
        return self.is_ready

    def status(self) -> dict[str, Any]:
        if self.broken is not None:
            raise self.broken
        return dict(self.value)

    def model(self, name: str) -> dict[str, Any]:
        return {"name": name, "argv": ["vllm", "serve"]}

    def why(self, name: str) -> dict[str, Any]:
        return {"name": name, "why": None}

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}

    def tallies(self) -> Tallies:
        return self.counted

    def log(
        self, name: str, *, lines: int, since: float | None, failed: bool, previous: bool, follow: bool, most: int
    ) -> LogReader:
        self.asked.append(("log", name, lines, since, failed, previous))
        self.shown = (follow, most)
        if previous:
            raise Refused(404, "no-log", f"{name} has no earlier log")
        return self.lines

    async def act(self, verb: Verb, names: Sequence[str], now: bool, caller: Caller) -> Mapping[str, Answer]:
        self.asked.append((verb, tuple(names), now))
        if self.release is not None:
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return {name: self.answers.get(name, Answer(1, 202, f"{name}: {verb}")) for name in names}

    async def lend(self, size: int, seconds: float, device: str | None, caller: Caller) -> Answer:
        return Answer(0, 200, f"{size} bytes of {device} for {seconds} s")

    async def reload(self, dry_run: bool, caller: Caller) -> Answer:
        self.asked.append(("reload", dry_run))
        return self.answers.get("reload", Answer(1, 200, "nothing changed", data={"plan": []}))

    async def validate(self, text: str) -> dict[str, Any]:
        self.asked.append(("validate", text))
        return {"ok": True, "problems": [], "warnings": []}

    async def plan(self, names: Sequence[str]) -> dict[str, Any]:
        self.asked.append(("plan", tuple(names)))
        return {"models": list(names)}

    def changed(self, caller: Caller, what: str, names: Sequence[str]) -> None:
        self.changes.append((caller, what, tuple(names)))

    def fault(self, ident: str, where: str, error: BaseException) -> None:
        self.faults.append((ident, where, error))


class Front:
    """Both listeners, and a client of each."""

    def __init__(self, path: Path, limits: Limits | None = None, log: EventLog | None = None) -> None:
        self.stub = Stub()
        self.events = log or EventLog()
        self.path = path
        self.listeners = Listeners(self.stub, self.events, path, HttpSpec((("127.0.0.1", 0),)), limits=limits)

    async def start(self) -> None:
        await self.listeners.start()
        self.unix = aiohttp.ClientSession("http://vllmd", connector=aiohttp.UnixConnector(str(self.path)))
        self.tcp = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")

    @property
    def port(self) -> int:
        return self.listeners.addresses[0][1]

    async def connect(self, kind: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection to the listener "unix" or "tcp"."""
        if kind == "unix":
            return await asyncio.open_unix_connection(str(self.path))
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def stop(self) -> None:
        await self.unix.close()
        await self.tcp.close()
        await self.listeners.stop()


@contextlib.asynccontextmanager
async def fronted(path: Path, limits: Limits | None = None, log: EventLog | None = None) -> AsyncIterator[Front]:
    """A started Front, stopped afterwards."""
    front = Front(path, limits, log)
    await front.start()
    try:
        yield front
    finally:
        await front.stop()


async def read_frame(reader: aiohttp.StreamReader | asyncio.StreamReader) -> dict[str, str]:
    """The next server-sent event as its fields; what comes before the first one is passed over."""
    while True:
        async with asyncio.timeout(20):
            text = (await reader.readuntil(b"\n\n")).decode()
        fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        if "event" in fields:
            return fields
