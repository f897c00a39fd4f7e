"""A model's log as the API reads it: every line once, across rotation and new starts, and nothing held in memory."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllmd.edge import logfile, logview
from vllmd.edge.logfile import Log, open_log, rotate
from vllmd.edge.logview import LogView, find_log


def view(path: Path, *, lines: int = 1000, since: float | None = None, follow: bool = True, **more: Any) -> LogView:
    return LogView(path, lines=lines, since=since, follow=follow, slots=asyncio.Semaphore(1), **more)


async def texts(reader: LogView) -> list[str]:
    """All that is there now."""
    found: list[str] = []
    while rows := await reader.read():
        found += [row["text"] for row in rows if not row.get("progress")]
    return found


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = open_log(tmp_path, "m", keep=3)
    yield made
    os.close(made.fd)


def say(log: Log, *words: object) -> None:
    for word in words:
        os.write(log.fd, f"{word}\n".encode())


async def test_the_tail_and_then_what_comes(log: Log) -> None:
    """Nothing twice, nothing missed."""
    say(log, 1, 2, 3)
    reader = view(log.path, lines=2)
    assert await texts(reader) == ["2", "3"]
    say(log, 4)
    assert await texts(reader) == ["4"]
    os.write(log.fd, b"ha")
    assert await texts(reader) == []
    say(log, "lf")
    assert await texts(reader) == ["half"]
    reader.close()


async def test_without_follow_it_ends_where_the_log_does(log: Log) -> None:
    """Also with a line that has no end yet; what comes later is not waited for."""
    say(log, 1)
    os.write(log.fd, b"2")
    reader = view(log.path, follow=False)
    assert await texts(reader) == ["1", "2"]
    say(log, 3)
    assert await texts(reader) == []
    reader.close()


@pytest.mark.parametrize("rotations", [1, 2, 3])
async def test_a_rotation_between_two_looks_loses_no_line(log: Log, rotations: int) -> None:
    """What had not been shown is read from NAME.log.1 and those before."""
    say(log, 1)
    reader = view(log.path)
    assert await texts(reader) == ["1"]
    expected = []
    for number in range(rotations):
        say(log, f"before {number}", f"{number} " + "x" * 500)
        expected += [f"before {number}", f"{number} " + "x" * 500]
        assert rotate(log.path, 0, keep=3).done
    say(log, "after")
    assert await texts(reader) == [*expected, "after"]
    say(log, "and more " * 200)  # the log is longer again than it was
    assert await texts(reader) == [("and more " * 200).strip()]
    reader.close()


async def test_a_line_across_a_rotation_is_one_line(log: Log) -> None:
    """Half of it in NAME.log.1."""
    reader = view(log.path)
    say(log, 1)
    os.write(log.fd, b"ha")
    assert await texts(reader) == ["1"]
    rotate(log.path, 0, keep=3)
    say(log, "lf")
    assert await texts(reader) == ["half"]
    reader.close()


async def test_a_new_start_is_followed_and_begins_a_new_line(tmp_path: Path, log: Log) -> None:
    """Also when its log has been rotated already; the old one's last words have no end."""
    reader = view(log.path)
    say(log, 1)
    assert await texts(reader) == ["1"]
    os.write(log.fd, b"killed in the mid")
    second = open_log(tmp_path, "m", keep=3)
    say(second, "new")
    rotate(second.path, 0, keep=3)
    say(second, "newer")
    assert await texts(reader) == ["killed in the mid", "new", "newer"]
    os.close(second.fd)
    reader.close()


async def test_a_log_of_which_nothing_is_kept_goes_on(log: Log) -> None:
    """log_keep = 0: it is cut, and what comes then is shown."""
    reader = view(log.path)
    say(log, "one")
    assert await texts(reader) == ["one"]
    rotate(log.path, 0, keep=0)
    say(log, 2)
    found = [line for _ in range(logview.WAITS + 1) for line in await texts(reader)]
    assert found == ["2"]
    reader.close()


async def test_a_long_log_comes_in_pieces(log: Log) -> None:
    """Each of about 64 KiB, so that sixty readers hold four megabytes and not four hundred."""
    os.write(log.fd, b"".join(b"%06d %s\n" % (number, b"x" * 93) for number in range(10_000)))
    reader = view(log.path, lines=10_000, follow=False)
    sizes, numbers = [], []
    while rows := await reader.read():
        sizes.append(sum(len(row["text"]) + 1 for row in rows))
        numbers += [int(row["text"][:6]) for row in rows]
    assert numbers == list(range(10_000))
    assert max(sizes) <= logfile.READ + 100
    reader.close()


async def test_no_more_than_the_limit_is_shown_and_that_is_said(log: Log) -> None:
    """The first row tells how much is left out."""
    say(log, *(f"line {number:03}" for number in range(100)))
    reader = view(log.path, most=90)
    first, *rest = await texts(reader)
    assert first == "[810 bytes before this are left out: at most 90 are shown]"
    assert rest == [f"line {number:03}" for number in range(90, 100)]
    reader.close()


@pytest.mark.parametrize(("lines", "since", "expected"), [(0, 3600.0, 0), (5, 99999999999.0, 2), (1, 1e300, 1)])
async def test_odd_wishes(log: Log, lines: int, since: float, expected: int) -> None:
    """No lines is none; since before all times is everything."""
    say(log, "INFO 01-01 00:00:00 [a.py:1] one", "two")
    reader = view(log.path, lines=lines, since=since, follow=False)
    assert len(await texts(reader)) == expected
    reader.close()


async def test_what_must_not_be_seen_is_taken_out(log: Log) -> None:
    """Of the tail and of what comes."""
    say(log, "a secret")
    reader = view(log.path, conceal=lambda text: text.replace("secret", "(hidden)"))
    say(log, "secret too")
    assert await texts(reader) == ["a (hidden)", "(hidden) too"]
    reader.close()


async def test_a_log_that_is_gone_is_empty(tmp_path: Path) -> None:
    """Nothing is raised."""
    reader = view(tmp_path / "none.log")
    assert await texts(reader) == []
    reader.close()


def test_each_kind_of_log_has_its_file(tmp_path: Path) -> None:
    """This start's, the last failed one's, the one before."""
    for name in ("m.log", "m.log.failed", "m.log.1"):
        (tmp_path / name).touch()
    assert find_log(tmp_path, "m", failed=False, previous=False) == tmp_path / "m.log"
    assert find_log(tmp_path, "m", failed=True, previous=False) == tmp_path / "m.log.failed"
    assert find_log(tmp_path, "m", failed=False, previous=True) == tmp_path / "m.log.1"
    assert find_log(tmp_path, "n", failed=False, previous=False) is None


async def test_many_readers_of_long_logs_leave_the_loop_its_turns(log: Log) -> None:
    """They look for their lines in threads, two at a time."""
    os.write(log.fd, b"".join(b"INFO 01-01 00:00:00 [a.py:1] %06d %s\n" % (n, b"x" * 64) for n in range(10_000)))
    slots = asyncio.Semaphore(2)
    readers = [LogView(log.path, lines=10_000, since=60.0 * n, follow=False, slots=slots) for n in range(20)]
    work = asyncio.gather(*(texts(reader) for reader in readers))
    longest, before = 0.0, time.monotonic()
    while not work.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
    assert {len(found) for found in work.result()} <= {0, 10_000}
    assert longest < 0.5
    for reader in readers:
        reader.close()
