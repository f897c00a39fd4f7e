"""The wiring: its tasks end when they are told to, and a defect in one costs no more than it must."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllmd.attempt import Attempt
from vllmd.edge.probe import Probe
from vllmd.edge.procfs import Member, Stat
from vllmd.edge.tasks import Tasks
from vllmd.events import Broken, DevicesRead, Event, Spawn
from vllmd.facts import Launch
from vllmd.lookout import Lookout
from vllmd.spec import Cause, DaemonSpec, ModelSpec


@pytest.mark.parametrize("turns", range(6))
async def test_a_look_asked_for_at_the_very_end_does_not_hold_it_up(turns: int) -> None:
    """asyncio.wait_for of Python 3.11 swallows a cancellation that comes together with what it waits for: the daemon
    then never ended."""
    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error!r}"))
    lookout = Lookout({}, lambda _: None)
    watch = tasks.start(lookout.watch(), "devices")
    await asyncio.sleep(0)
    lookout.soon()
    for _ in range(turns):
        await asyncio.sleep(0)
    await asyncio.wait([asyncio.ensure_future(tasks.end())], timeout=2.0)  # noqa: TID251 - ended below, whatever comes
    ended = watch.done()
    watch.cancel()
    assert ended


async def test_a_preflight_that_raises_is_one_models_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that nobody thought of fails that model, with the error named; the daemon goes on."""

    def inspect(*_: object, **__: object) -> None:
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr("vllmd.lookout.inspect", inspect)
    daemon = DaemonSpec(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path)
    found = await Lookout({}, lambda _: None).preflight(ModelSpec("a", "/m"), {}, daemon)
    assert isinstance(found, Cause) and not found.heals
    assert "recursion depth mismatch" in found.text


def an_attempt(folder: Path, tasks: Tasks, posted: list[Event], said: list[str]) -> Attempt:
    """One that was never started."""
    shared = SimpleNamespace(
        post=posted.append, tasks=tasks, probe=Probe(), complain=said.append, secrets=frozenset(), log_dir=folder,
        records_dir=folder, cgroups=None,
    )  # fmt: skip
    launch = Launch(("/bin/true",), {}, f"unix:{folder}/s", "a", str(folder / "t"), "mark:a:1")
    return Attempt(Spawn("a", 1, "a", launch), ModelSpec("a", "/m"), shared)  # type: ignore[arg-type]


async def test_a_defect_in_one_engines_tasks_ends_that_engine_only(tmp_path: Path) -> None:
    """The task group hears of no error, the core of one broken attempt."""
    posted: list[Event] = []
    said: list[str] = []
    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error!r}"))
    attempt = an_attempt(tmp_path, tasks, posted, said)

    async def follow() -> None:
        raise ValueError("a line that nobody thought of")

    attempt._begin(follow(), "log")
    await asyncio.wait(tasks._running, timeout=5.0)
    assert [type(event) for event in posted] == [Broken]
    assert "a line that nobody thought of" in said[0]


async def test_a_tree_that_is_being_killed_is_still_its_models() -> None:
    """Its memory is not others' while it dies: the devices are read with its processes until none is left."""
    asked: list[Mapping[str, frozenset[int]]] = []
    seen = asyncio.Event()
    attempts = {
        "dying": SimpleNamespace(live=False, is_ready=True, look=lambda _: frozenset({12})),
        "up": SimpleNamespace(live=True, is_ready=True, look=lambda _: frozenset({34})),
    }

    class Devices:
        def read(self, pids: Mapping[str, frozenset[int]]) -> DevicesRead:
            asked.append(pids)
            return DevicesRead(())

    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error!r}"))
    lookout = Lookout(attempts, lambda _: seen.set())  # type: ignore[arg-type]
    lookout._devices = Devices()  # type: ignore[assignment]
    tasks.start(lookout.watch(), "devices")
    lookout.soon()
    async with asyncio.timeout(20):
        await seen.wait()
    await tasks.end()
    assert asked[0] == {"dying": frozenset({12}), "up": frozenset({34})}


async def test_an_attempt_that_is_being_killed_knows_its_own_from_a_stranger_with_its_number(tmp_path: Path) -> None:
    """A number is given out again; the start tells them apart."""
    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error!r}"))
    attempt = an_attempt(tmp_path, tasks, [], [])
    attempt.watch = SimpleNamespace(known={Member(12, "VLLM::EngineCor", 100), Member(13, "VLLM::Worker", 100)})  # type: ignore[assignment]
    attempt._killing = True
    stranger = Member(13, "sh", 900)
    table = {12: Stat(Member(12, "VLLM::EngineCor", 100), 1, 12, 12, False), 13: Stat(stranger, 1, 13, 13, False)}
    assert attempt.look(table) == frozenset({12})
