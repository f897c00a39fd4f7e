"""What the core shows is what docs/status.md and OpenAPI promise, in every state that a model passes."""

from typing import Any

import jsonschema

from tests.sim import Sim, settings, spec
from vllmd.core import view
from vllmd.edge.backend import Tallies
from vllmd.edge.metrics import render
from vllmd.edge.schemas import rows, schemas
from vllmd.events import Start, Stop
from vllmd.spec import Cause

DAEMON = {
    "version": "1", "pid": 1, "host": "h", "uptime_s": 1.5, "config": "/c", "http": ["http://127.0.0.1:8400"],
    "spare": 0, "spare_ready": False,
    "access": "read",
}  # fmt: skip
PROMISE = jsonschema.Draft202012Validator({"$ref": "#/components/schemas/Status", "components": {"schemas": schemas()}})


class Seen:
    """Just enough of a Backend for the metrics."""

    def __init__(self, status: dict[str, Any]) -> None:
        self.value = status

    def status(self) -> dict[str, Any]:
        return self.value

    def tallies(self) -> Tallies:
        return Tallies()


def check(sim: Sim) -> dict[str, Any]:
    """The status, which keeps the promise and can be scraped."""
    status = view.status(sim.core.world, DAEMON, sim.now)
    PROMISE.validate(status)
    render(Seen(status))  # type: ignore[arg-type]
    return status


def test_the_status_keeps_its_promise_in_every_state() -> None:
    """From stopped over ready to failed; every field is there and of its type."""
    sim = Sim(settings(spec("a"), spec("b"), spec("c", 90.0)))
    seen = set()

    def look() -> None:
        seen.update(row["state"] for row in check(sim)["models"])

    look()
    sim.send(Start("a"))
    look()
    sim.inspect("a")
    sim.spawned("a")
    look()
    sim.measured("a")
    sim.ready("a")
    sim.pass_time(10)
    look()
    sim.send(Start("b"))
    sim.inspect("b")
    sim.spawned("b")
    sim.breaks("b")
    look()
    sim.gone("b", Cause("crashed", "it crashed", "crashed"))
    look()
    sim.problems["c"] = Cause("no-model", "there is none", "no model", heals=False)
    sim.send(Start("c"))
    sim.inspect("c")
    look()
    sim.send(Stop("a"))
    look()
    assert {"stopped", "waiting", "starting", "ready", "stopping", "failed"} <= seen


def test_nothing_is_shown_that_is_not_described() -> None:
    """A new field of the status is described, or this fails."""
    sim = Sim(settings(spec("a")))
    sim.problems["a"] = Cause("no-model", "there is none", "no model", heals=False)
    sim.send(Start("a"))
    sim.inspect("a")
    status = check(sim)
    for table, value in (
        ("Status", status),
        ("Daemon", status["daemon"]),
        ("Device", status["devices"][0]),
        ("Model", status["models"][0]),
        ("Why", status["models"][0]["why"]),
    ):
        assert [row.name for row in rows(table)] == list(value), table
