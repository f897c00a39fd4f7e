"""The feed: the picture is what vllmd said last, with its times moved on."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ctl_daemon import LIMIT, Daemon, event
from tests.ctl_status import device, model, status, why
from vllmd.ctl import feed as module
from vllmd.ctl.client import Client
from vllmd.ctl.faults import Unreachable
from vllmd.ctl.feed import Feed, aged


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path) as running:
        running.status = status([model("a", since_s=5.0), model("b")], [device()])
        running.routes = {"GET /api/v1/events": running.events}
        yield running


def until(feed: Feed, kind: str) -> None:
    """Poll until an event of this kind has come."""
    for _ in range(int(LIMIT)):
        if any(each == kind for each, _ in feed.poll(1.0)[0]):
            return
    raise AssertionError(f"no {kind}")


def until_lost(feed: Feed) -> None:
    """Poll until the connection is gone."""
    for _ in range(int(LIMIT)):
        feed.poll(1.0)
        if feed.lost is not None:
            return
    raise AssertionError("not lost")


def test_times_rise_and_fall_with_the_clock() -> None:
    """Ages grow, what is left shrinks and stops at nothing, the rest stays."""
    was = {"since_s": 5.0, "elapsed_s": None, "eta_s": 3.0, "deadline_s": 100.0, "used": 7}
    assert aged(was, 10.0) == {"since_s": 15.0, "elapsed_s": None, "eta_s": 0.0, "deadline_s": 90.0, "used": 7}


def test_the_picture_is_of_now(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object ages from when it was told."""
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    feed = Feed(Client(str(daemon.path)))
    until(feed, "snapshot")
    now = 1010.0
    daemon.feed.put(event("model", model("b", "waiting", since_s=1.0)))
    until(feed, "model")
    now = 1012.0
    assert [each["since_s"] for each in feed.picture()["models"]] == [17.0, 3.0]
    assert feed.picture()["daemon"]["uptime_s"] == 3 * 86400.0 + 12.0
    feed.close()


def test_events_replace_add_and_remove(daemon: Daemon) -> None:
    """Objects are whole; the order of the configuration stays; odd events change nothing."""
    feed = Feed(Client(str(daemon.path)))
    for kind, data in (
        ("model", model("a", "ready")), ("model", model("c")), ("removed", {"name": "b"}), ("device", device(silent_s=20.0)),
        ("model", ["odd"]), ("device", None), ("removed", {}), ("unheard-of", {}), ("clock", {}),
    ):  # fmt: skip
        daemon.feed.put(event(kind, data))
    until(feed, "clock")
    assert [(each["name"], each["state"]) for each in feed.picture()["models"]] == [("a", "ready"), ("c", "stopped")]
    assert [each["silent_s"] for each in feed.picture()["devices"]] == [20.0]
    feed.close()


def test_what_comes_with_the_first_snapshot_is_not_lost(daemon: Daemon) -> None:
    """Whoever waits sees every state, also those that are over by the first look."""
    daemon.feed.put(event("model", model("a", "starting")))
    daemon.feed.put(event("model", model("a", "ready")))
    daemon.feed.put(event("clock", {}))
    feed, kinds = Feed(Client(str(daemon.path))), []
    while "clock" not in kinds:
        kinds += [kind for kind, _ in feed.poll(1.0)[0]]
    assert [kind for kind in kinds if kind] == ["snapshot", "model", "model", "clock"]
    feed.close()


def test_a_lost_connection_comes_back_with_a_snapshot(daemon: Daemon) -> None:
    """Lost counts up meanwhile, the picture stays."""
    feed = Feed(Client(str(daemon.path)))
    until(feed, "snapshot")
    daemon.status = status([model("z")], [])
    daemon.feed.put(None)
    until_lost(feed)
    assert [each["name"] for each in feed.picture()["models"]] == ["a", "b"]
    until(feed, "snapshot")
    assert [each["name"] for each in feed.picture()["models"]] == ["z"]
    feed.close()


def test_garbage_in_the_stream_is_a_lost_connection(daemon: Daemon) -> None:
    """Not the end of whoever watches."""
    feed = Feed(Client(str(daemon.path)))
    until(feed, "snapshot")
    daemon.feed.put(b"zz\r\nno chunk")
    until_lost(feed)
    until(feed, "snapshot")
    feed.close()


def test_a_stream_without_a_snapshot_is_no_vllmd(daemon: Daemon) -> None:
    """It ends before it began."""
    daemon.routes["GET /api/v1/events"] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(Unreachable, match="no first event"):
        Feed(Client(str(daemon.path)))


STATUS = "GET /api/v1/status"


def asked(daemon: Daemon) -> int:
    """How often the status has been asked for."""
    return sum(what == STATUS for what, _ in daemon.asked)


def test_sentences_of_a_moving_model_are_asked_anew_each_second(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an event, for eyes: "start 2 of 5 in 7 s" is vllmd's to count down. It comes as a snapshot."""
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    daemon.status = status([model("a", "backoff", why=why("start 2 of 5 in 7 s"))], [device()])
    daemon.routes[STATUS] = status([model("a", "backoff", why=why("start 2 of 5 in 6 s"))], [device()])
    feed = Feed(Client(str(daemon.path)), live=True)
    until(feed, "snapshot")
    feed.poll(0.0)
    assert asked(daemon) == 0
    now += 1.0
    assert [kind for kind, _ in feed.poll(0.0)[0]] == ["snapshot"]
    assert feed.picture()["models"][0]["why"]["short"] == "start 2 of 5 in 6 s"
    feed.poll(0.0)
    assert asked(daemon) == 1
    now += 1.0
    feed.poll(0.0)
    assert asked(daemon) == 2
    feed.close()


@pytest.mark.parametrize(
    ("state", "live", "times"),
    [("ready", True, 0), ("stopped", True, 0), ("failed", True, 0), ("backoff", False, 0), ("waiting", True, 1),
     ("draining", True, 1), ("stopping", True, 1), ("starting", True, 1)],
)  # fmt: skip
def test_nothing_is_asked_where_nothing_moves_or_nobody_looks(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, state: str, live: bool, times: int
) -> None:
    """A watch of models at rest costs vllmd nothing, a pipe neither."""
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    daemon.status = daemon.routes[STATUS] = status([model("a", state)], [device()])
    feed = Feed(Client(str(daemon.path)), live=live)
    until(feed, "snapshot")
    now += 5.0
    feed.poll(0.0)
    assert asked(daemon) == times
    feed.close()


def test_a_vllmd_that_does_not_answer_is_not_asked_so_often(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture stays, and keys are not held up each second."""
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    daemon.status = status([model("a", "starting")], [device()])
    daemon.routes[STATUS] = (503, {})
    feed = Feed(Client(str(daemon.path)), live=True)
    until(feed, "snapshot")
    for _ in range(3):
        now += 1.0
        feed.poll(0.0)
    assert asked(daemon) == 1 and feed.picture()["models"][0]["state"] == "starting" and feed.lost is None
    feed.close()
