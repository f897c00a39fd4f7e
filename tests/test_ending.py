"""The daemon's own log and its end: neither a log that leads nowhere nor a failure at the end leaves models behind."""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.daemon import LIMIT, Vllmd, fake_vllm, vllmd, weights
from tests.e2e.chat import answers
from vllmd import ending
from vllmd.ctl.faults import Fault
from vllmd.edge.journal import Printed, configure
from vllmd.edge.tasks import Tasks
from vllmd.ending import Ending

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures

# -- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["console", "json"])
def test_what_cannot_be_written_is_counted_and_told_later(tmp_path: Path, form: str) -> None:
    """A full disk: nothing is raised; once there is room again it is said how much is missing."""
    with Path("/dev/full").open("w") as full, (tmp_path / "log").open("w") as good:
        log = configure("info", form, full)
        for _ in range(3):
            log.error("lost", exc_info=ValueError("x"))
        printed = Printed(full, as_json=form == "json")
        for _ in range(3):
            printed.error("lost")
        printed._stream = good
        printed.error("found")
        printed.error("again")
    told, found, again = (tmp_path / "log").read_text().splitlines()
    assert "3 lines of this log could not be written" in told
    assert form == "console" or json.loads(told)["level"] == "warning"
    assert (found, again) == ("found", "again")


def test_a_stream_that_is_closed_or_was_never_there_is_no_obstacle() -> None:
    """As with 2>&- and a pipe whose reader has gone."""
    closed = io.StringIO()
    closed.close()
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        for stream in (closed, broken, None):
            Printed(stream, as_json=False).info("words")


# -- the end ----------------------------------------------------------------------------------------------------------


class Part:
    """Something that is to be ended; keeps the order, and fails if told to."""

    def __init__(self, order: list[str], failing: set[str]) -> None:
        self._order, self._failing = order, failing

    def step(self, name: str) -> Any:
        async def work(*_: object) -> None:
            self._order.append(name)
            if name in self._failing:
                raise RuntimeError(name)

        return work


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize(
    "failing", [set(), {"listeners"}, {"a"}, {"runaways", "clear"}, {"listeners", "a", "b", "clear"}]
)
async def test_whatever_fails_at_the_end_the_rest_is_done(
    monkeypatch: pytest.MonkeyPatch, code: int, failing: set[str]
) -> None:
    """Every step is tried, each error is told; after a failure the models come first."""
    order: list[str] = []
    said: list[str] = []
    part = Part(order, failing)
    monkeypatch.setattr(ending, "end_runaways", part.step("runaways"))
    monkeypatch.setattr(ending.signal, "signal", lambda *_: None)
    attempts = {name: SimpleNamespace(instance=name, over=False, end=part.step(name)) for name in "ab"}
    daemon = SimpleNamespace(
        serving=True, exit_code=code, ties=SimpleNamespace(supervised=False), attempts=attempts,
        listeners=SimpleNamespace(stop=part.step("listeners")), tasks=Tasks(lambda *_: None), write=lambda: None,
        saver=SimpleNamespace(clear=part.step("clear")), log=SimpleNamespace(error=said.append, info=said.append),
        store=SimpleNamespace(unlock=lambda: order.append("unlock")), gateway=SimpleNamespace(close=lambda: None),
        parking=SimpleNamespace(spares=SimpleNamespace(drop=part.step("spare"))),
    )  # fmt: skip
    await Ending(daemon).leave()  # type: ignore[arg-type]
    models_again = ["a", "b"]  # they are not over: it is tried once more
    begin = [*models_again, "listeners", *models_again] if code else ["listeners", *models_again]
    assert order == [*begin, "spare", "runaways", "clear", "unlock"]
    assert {text.split("'")[1] for text in said if "RuntimeError" in text} == failing
    assert said[-1] == "vllmd has ended"


# Each with what a shell does to standard error.
BROKEN = {"full disk": 'exec "$@" 2>/dev/full', "closed pipe": 'exec "$@" 2> >(exec true)', "closed": 'exec "$@" 2>&-'}


@pytest.mark.parametrize("way", BROKEN)
def test_a_daemon_whose_log_leads_nowhere_serves_and_ends_in_order(vllmd: Vllmd, way: str) -> None:
    """It starts, restarts a crashed model, and leaves nothing behind; exit code 0."""
    vllmd.command = ["bash", "-c", BROKEN[way], "bash", *vllmd.command]
    vllmd.model("a")
    vllmd.write()
    vllmd.spawn()
    until_up(vllmd)
    (a,) = vllmd.up("a")
    os.kill(a["pid"], signal.SIGKILL)
    assert answers(vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2))
    assert vllmd.stop() == 0


def test_an_internal_error_ends_the_models_although_the_log_leads_nowhere(vllmd: Vllmd) -> None:
    """The story of the bug cannot be told; the models are ended all the same."""
    vllmd.command = [
        "bash", "-c", BROKEN["closed pipe"], "bash", sys.executable, "-c",
        "from vllmd.core import wishes\n"
        "def bug(*_): raise RuntimeError('a bug')\n"
        "wishes.stop.__code__ = bug.__code__\n"
        "from vllmd.__main__ import main; raise SystemExit(main())",
    ]  # fmt: skip
    vllmd.exit_code = 1
    vllmd.model("a")
    vllmd.write()
    vllmd.spawn()
    until_up(vllmd)
    vllmd.up("a")
    with contextlib.suppress(Fault):  # it is not answered any more
        vllmd.client.fetch("POST", "/api/v1/models/a/stop", {})
    assert vllmd.ended() == 1
    assert vllmd.tree() == []


def until_up(daemon: Vllmd) -> None:
    """It cannot say so."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        try:
            if daemon.client.fetch("GET", "/readyz")[0].status == 200:
                return
        except Exception:
            time.sleep(0.05)
    raise AssertionError("never up")


def test_an_interrupt_while_it_is_being_imported_is_quiet(vllmd: Vllmd) -> None:
    """Ctrl-C in the first moment: no traceback, exit code 130."""
    slow = vllmd.folder / "slow"
    slow.mkdir()
    (slow / "structlog.py").write_text(
        'import sys, time; print(\'{"event": "importing"}\', file=sys.stderr, flush=True); time.sleep(60)'
    )
    vllmd.environment["PYTHONPATH"] = str(slow)
    vllmd.write()
    vllmd.spawn()
    vllmd.hear(lambda line: line["event"] == "importing")
    assert vllmd.stop(signal.SIGINT) == 130
    assert "Traceback" not in vllmd.said
