"""vllmctl against vllmd's own listeners with a daemon that is a dict behind them: both keep the same contract."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.stub_backend import NO_ROOM, Front, fronted
from vllmd.ctl.__main__ import main
from vllmd.edge.backend import Verb
from vllmd.events import Answer


@pytest.fixture(autouse=True)
def locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs are drawn as in most terminals, whatever this one has."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


async def ctl(front: Front, *argv: str) -> int:
    return await asyncio.to_thread(main, [*argv, "--socket", str(front.path)])


@pytest.mark.parametrize(
    ("argv", "code", "shown"),
    [
        (["status"], 0, "● alpha"),
        (["status"], 0, f"× big: {NO_ROOM.removeprefix('cannot start big: ')}"),
        (["devices"], 0, "GPU 0 RTX"),
        (["show", "alpha"], 0, "argv: vllm serve"),
        (["why", "alpha"], 0, "alpha"),
        (["why", "alpa"], 4, 'did you mean "alpha"?'),
        (["start", "alpa"], 4, 'did you mean "alpha"?'),
        (
            ["start", "alpa", "bigg", "big"],
            4,
            'no model is called "alpa" or "bigg"\n  did you mean "alpha" and "big"?\n',
        ),
        (["plan", "alp", "nothing"], 4, 'no model is called "alp" or "nothing"\n  did you mean "alpha"?\n'),
        (["stop", "ALPHA"], 4, 'did you mean "alpha"?'),
        (["stop", "gig"], 4, 'no model is called "gig"\n  configured: alpha, big, b.e-t_a\n'),
        (["start", "--category", "ocrr"], 4, "ocr"),
        (["validate", "/etc/vllmd.toml"], 78, ""),
        (["logs", "-n", "3", "--since", "1h", "--failed", "alpha"], 0, "one"),
        (["logs", "--previous", "alpha"], 1, "no earlier log"),
        (["start", "alpha"], 0, "alpha ready after"),
        (["stop", "alpha", "--now", "--no-wait"], 0, "alpha: stop accepted"),
        (["start", "big", "--timeout", "100ms"], 1, "cannot start big: needs 5.0 GiB"),
        (["start", "b.e-t_a", "--timeout", "100ms"], 6, "b.e-t_a goes on starting (weights 50 %)"),
        (["plan", "alpha"], 0, ""),
        (["reload"], 0, "nothing changed"),
        (["version"], 0, "vllmd 1 (pid 4)"),
    ],
)
async def test_what_one_says_the_other_understands(
    argv: list[str], code: int, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Paths, parameters and shapes of every command fit the routes."""
    async with fronted(tmp_path / "v.sock") as front:
        assert await ctl(front, *argv) == code
    said = capsys.readouterr()
    assert shown in said.out + said.err


async def test_no_room_keeps_its_sum_and_its_remedies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """409 of one model is code 5, through a bulk request too."""
    async with fronted(tmp_path / "v.sock") as front:
        front.stub.answers["big"] = Answer(1, 409, NO_ROOM, "no-room", ("stop alpha", "lower kv_cache"))
        assert await ctl(front, "start", "big") == 5
        assert front.stub.asked == [(Verb.START, ("big",), False)]
    assert capsys.readouterr().err == f"vllmctl: {NO_ROOM}\n  try: stop alpha\n  try: lower kv_cache\n"


async def test_a_start_is_followed_over_real_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Snapshot, model events, removal: what the event log publishes is what the waiting reads."""
    async with fronted(tmp_path / "v.sock") as front:
        waiting = asyncio.create_task(ctl(front, "start", "b.e-t_a"))  # noqa: TID251
        row = front.stub.value["models"][2]
        while not waiting.done():
            front.events.publish("model", row | {"state": "ready", "phase": None})
            await asyncio.wait([waiting], timeout=0.05)
        assert await waiting == 0
    assert "b.e-t_a ready after" in capsys.readouterr().out


async def test_events_and_a_followed_log_end_with_the_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bye ends the events as asked, and the log with a complaint: the model may go on."""
    async with fronted(tmp_path / "v.sock") as front:
        events = asyncio.create_task(ctl(front, "events", "--json"))  # noqa: TID251
        log = asyncio.create_task(ctl(front, "logs", "-f", "alpha"))  # noqa: TID251
        while front.stub.lines.batches or not capsys_has(capsys, '"snapshot"'):
            await asyncio.wait([events, log], timeout=0.02)
        front.events.publish("note", {"text": "x", "level": "info"})
        await front.listeners.stop()
        assert (await events, await log) == (0, 3)


SEEN: list[str] = []


def capsys_has(capsys: pytest.CaptureFixture[str], text: str) -> bool:
    """Whether `text` has been printed by now."""
    SEEN.append(capsys.readouterr().out)
    return text in "".join(SEEN)


async def test_json_is_the_answer_of_the_api(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """status --json = GET /api/v1/status, with the access that the socket gives."""
    async with fronted(tmp_path / "v.sock") as front:
        assert await ctl(front, "status", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert status["daemon"]["access"] == "admin" and [m["name"] for m in status["models"]] == [
        "alpha",
        "big",
        "b.e-t_a",
    ]
