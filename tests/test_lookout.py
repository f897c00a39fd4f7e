"""The wiring: its tasks end when they are told to, and a defect in one costs no more than it must."""

import asyncio
from pathlib import Path

import pytest

from vllmd.attempt import Attempt
from vllmd.core.cause import Rules
from vllmd.edge.probe import Probe
from vllmd.edge.tasks import Tasks
from vllmd.events import Broken, Event, Spawn
from vllmd.facts import Launch
from vllmd.lookout import Lookout
from vllmd.shared import Shared
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


async def test_a_defect_in_one_engines_tasks_ends_that_engine_only(tmp_path: Path) -> None:
    """The task group hears of no error, the core of one broken attempt."""
    posted: list[Event] = []
    said: list[str] = []
    tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error!r}"))
    rules = Rules(1, ())
    shared = Shared(posted.append, tasks, Probe(), rules, tmp_path, 1 << 20, 3, None, said.append)
    launch = Launch(("/bin/true",), {}, f"unix:{tmp_path}/s", "a", str(tmp_path / "t"), "mark:a:1")
    attempt = Attempt(Spawn("a", 1, "a", launch), ModelSpec("a", "/m"), shared)

    async def follow() -> None:
        raise ValueError("a line that nobody thought of")

    attempt._begin(follow(), "log")
    await asyncio.wait(tasks._running, timeout=5.0)
    assert [type(event) for event in posted] == [Broken]
    assert "a line that nobody thought of" in said[0]
