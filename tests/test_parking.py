"""When a spare is parked, and when it is given up: with stand-ins for the daemon and for the spares."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd import parking
from vllmd.core.states import State
from vllmd.edge.spare import NONE
from vllmd.events import Note
from vllmd.facts import Launch

LIMIT = 30.0
LAUNCH = Launch(("/bin/vllm", "serve", "m"), {"A": "1"}, "unix:/x", "m", "/s", "c")


class Spares:
    """Keeps what it is told; `says` is its answer to a start."""

    def __init__(self) -> None:
        self.says = NONE
        self.prepared: list[tuple[str, Mapping[str, str]]] = []
        self.dropped = 0
        self.bytes = 0

    def take(self, launch: Launch, **_: Any) -> str:
        return self.says

    def prepare(self, executable: str, env: Mapping[str, str]) -> str:
        self.prepared.append((executable, env))
        return ""

    def rss(self) -> int:
        return self.bytes

    async def drop(self) -> None:
        self.dropped += 1


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, spare: int | None) -> None:
        monkeypatch.setattr(parking, "LOOK_EVERY", 0.001)
        monkeypatch.setattr(parking, "spawn", lambda launch, **_: "spawned")
        self.notes: list[Note] = []
        self.instance = SimpleNamespace(state=State.STOPPED)
        self.settings = SimpleNamespace(daemon=SimpleNamespace(spare=spare))
        world = SimpleNamespace(
            closing=False, instances={"m": self.instance}, settings=SimpleNamespace(models={}),
            ledger=SimpleNamespace(readings={}),
        )  # fmt: skip
        daemon = SimpleNamespace(
            settings=self.settings, voice=SimpleNamespace(note=self.notes.append), core=SimpleNamespace(world=world)
        )
        self.parking = parking.Parking(daemon, Path("/s"), "mark")  # type: ignore[arg-type]
        self.spares = self.parking.spares = Spares()  # type: ignore[assignment]

    def start(self) -> Any:
        return self.parking.begin(LAUNCH, log_fd=1, cwd=Path("/s"))

    async def until(self, what: Any) -> None:
        async with asyncio.TaskGroup() as group:
            run = group.create_task(self.parking.run())
            async with asyncio.timeout(LIMIT):
                while not what():
                    await asyncio.sleep(0.001)
            run.cancel()


async def test_one_is_parked_as_the_latest_launch_was_when_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 1)
    bench.instance.state = State.STARTING
    assert bench.start() == "spawned"
    looks = 0

    def looked() -> bool:
        nonlocal looks
        looks += 1
        return looks > 20

    await bench.until(looked)
    assert bench.spares.prepared == [], "its import would compete with the start"
    bench.instance.state = State.READY
    await bench.until(lambda: bench.spares.prepared)
    assert bench.spares.prepared[0] == ("/bin/vllm", {"A": "1"})


async def test_one_that_suits_nobody_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start that it does not suit is chance, two in a row are none; that it was not there yet does not count."""
    bench = Bench(monkeypatch, 1)
    for _ in range(3):
        bench.start()
    bench.spares.says = "it differs in OMP_NUM_THREADS"
    bench.start()
    await bench.until(lambda: bench.spares.prepared)
    assert bench.spares.dropped == 0
    bench.start()
    await bench.until(lambda: bench.spares.dropped)
    assert "OMP_NUM_THREADS" in bench.notes[-1].text


async def test_none_is_parked_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, 0)
    bench.start()
    await bench.until(lambda: bench.spares.dropped > 3)
    assert bench.spares.prepared == []
    assert "daemon.spare = 0" in bench.notes[0].text


@pytest.mark.parametrize(("free", "parks"), [(4, False), (16, True)])
async def test_without_a_word_it_depends_on_the_memory(monkeypatch: pytest.MonkeyPatch, free: int, parks: bool) -> None:
    bench = Bench(monkeypatch, None)
    monkeypatch.setattr(parking.psutil, "virtual_memory", lambda: SimpleNamespace(available=free << 30))
    bench.start()
    await bench.until(lambda: bench.spares.prepared if parks else bench.spares.dropped)
    assert bool(bench.spares.prepared) is parks
