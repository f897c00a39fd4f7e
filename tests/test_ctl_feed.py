"""The feed: the picture is what vllmd said last, with its times moved on."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ctl_daemon import LIMIT, Daemon, event
from tests.ctl_status import device, model, status
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
