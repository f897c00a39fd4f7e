"""What the daemon's service makes of the core's answers: plans and reloads, without a daemon around it."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.sim import GIB, Sim, settings, spec
from vllmd.edge.backend import Access, Caller
from vllmd.events import Answer, Event, Reload
from vllmd.facts import EngineFacts, Inspection, ModelFacts
from vllmd.service import Service
from vllmd.spec import Cause, ModelSpec, Settings

TAKEN = Cause("port-taken", "port 8000 is taken by vllm (pid 7)", "port taken")


class Stub:
    """A daemon with a core, and a file that says `new`."""

    def __init__(self, sim: Sim, new: Settings | None = None) -> None:
        self.core = sim.core
        self.sim, self.new = sim, new
        self.settings = sim.core.world.settings
        self.path = Path("/vllmd.toml")
        self.attempts: dict[str, Any] = {}
        self.lookout = SimpleNamespace(preflight=self.preflight)
        self.log = SimpleNamespace(error=lambda text, **more: self.errors.append((text, more)))
        self.errors: list[tuple[str, Mapping[str, Any]]] = []
        self.futures: dict[int, asyncio.Future[Answer]] = {}

    async def preflight(self, model: ModelSpec, taken: Mapping[int, str], _: object) -> Inspection | Cause:
        """The port is busy, as it is under a running engine."""
        if model.port:
            return TAKEN
        return Inspection(ModelFacts("/m", {}, GIB, "f"), EngineFacts("/bin/vllm", "0.32.0"), None)

    @property
    def deeds(self) -> "Stub":
        return self

    async def inspect(self, name: str) -> Inspection | Cause | None:
        return await self.preflight(self.settings.models[name], {}, None)

    def ask(self) -> tuple[int, asyncio.Future[Answer]]:
        ticket = self.sim.ticket()
        self.futures[ticket] = asyncio.get_running_loop().create_future()
        return ticket, self.futures[ticket]

    def adopt(self, new: Settings) -> None:
        self.settings = new

    def post(self, event: Event) -> None:
        self.sim.send(event)
        for ticket, future in self.futures.items():
            if ticket in self.sim.answers and not future.done():
                future.set_result(self.sim.answers[ticket])


def service(sim: Sim, new: Settings | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Service, Stub]:
    stub = Stub(sim, new)
    monkeypatch.setattr("vllmd.service.load", lambda _: new)
    return Service(stub), stub  # type: ignore[arg-type]


async def test_the_port_of_a_running_model_is_no_reason_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own engine holds it. A stranger there is one."""
    sim = Sim(settings(spec("a", port=8000), spec("b", port=8001)))
    sim.up("a")
    asked, stub = service(sim, None, monkeypatch)
    stub.attempts = {"a": SimpleNamespace(live=True, port=8000)}
    rows = {row["model"]: row for row in (await asked.plan([]))["models"]}
    assert rows["a"]["fits"] and rows["a"]["fits_now"]
    assert not rows["b"]["fits"] and rows["b"]["text"] == TAKEN.text


async def test_a_plan_of_named_models_is_of_all_of_them_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all, each is looked at for itself."""
    sim = Sim(settings(spec("a", 5), spec("b", 5)))
    asked, _ = service(sim, None, monkeypatch)
    assert [row["fits"] for row in (await asked.plan(["a", "b"]))["models"]] == [True, False]
    assert [row["fits"] for row in (await asked.plan([]))["models"]] == [True, True]


async def test_a_reload_with_what_can_never_fit_is_refused_and_by_signal_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits for the answer to a SIGHUP."""
    sim = Sim(settings(spec("a")))
    asked, stub = service(sim, settings(spec("a"), spec("b", 20)), monkeypatch)
    answer = await asked.reload(False, Caller(Access.ADMIN, "test"))
    assert answer.status == 422 and "models.b.vram: 20.0 GiB can never fit" in answer.message
    assert 'models.b.vram = "8GiB"' in answer.remedies
    assert not sim.core.world.settings.models.keys() - {"a"}
    stub.errors.clear()
    await asked.reload(True, Caller(Access.ADMIN, "test"))
    assert not stub.errors  # a dry run only asks
    await asked.reload_by_signal()
    assert "models.b.vram: 20.0 GiB can never fit" in stub.errors[0][0]


async def test_a_reload_is_not_refused_for_what_could_not_fit_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card was swapped for a smaller one: everything else may still be changed."""
    sim = Sim(settings(spec("a", 20), spec("b")))
    asked, _ = service(sim, settings(spec("a", 20), spec("b", 2)), monkeypatch)
    assert (await asked.reload(False, Caller(Access.ADMIN, "test"))).status == 200
    assert sim.inst("b").spec.vram == 2 * GIB


async def test_a_reload_that_lowers_the_limit_below_a_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could fit before and could not any more."""
    sim = Sim(settings(spec("a", 5)))
    asked, _ = service(sim, settings(spec("a", 5), limit=4), monkeypatch)
    assert (await asked.reload(False, Caller(Access.ADMIN, "test"))).status == 422


async def test_known_weights_are_judged_at_a_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model was looked at before: what its files need is known, given vram or not."""
    sim = Sim(settings(spec("a", None)))
    sim.up("a")
    asked, _ = service(sim, settings(spec("a", None), limit=1), monkeypatch)
    answer = await asked.reload(False, Caller(Access.ADMIN, "test"))
    assert answer.status == 422 and "models.a.model: 1." in answer.message


def test_reload_is_an_event_like_any_other() -> None:
    """The stub above hands it to a real core."""
    sim = Sim(settings(spec("a")))
    sim.send(Reload(settings(spec("a"), spec("b")), ticket=sim.ticket()))
    assert sim.answers[1].status == 200
