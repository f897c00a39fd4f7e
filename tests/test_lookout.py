"""The daemon's eyes end when they are told to."""

import asyncio

import pytest

from vllmd.edge.tasks import Tasks
from vllmd.lookout import Lookout


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
