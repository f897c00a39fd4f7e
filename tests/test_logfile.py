"""A child's log: what is read from it, how it is kept small and kept, and that no trouble with it is raised."""

import errno
import os
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.edge import logfile
from vllmd.edge.logfile import Follower, Rotated, keep_failed, open_log, rotate
from vllmd.edge.logread import find_start, tail
from vllmd.edge.logtext import LONGEST, Line, Splitter


def read_all(follower: Follower) -> list[str]:
    lines = follower.read_new()
    while follower.more:
        lines += follower.read_new()
    return [line.text for line in lines if not line.progress]


def write(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# -- lines ------------------------------------------------------------------------------------------------------------

pieces = st.lists(
    st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b"\xe2\x82\xac", b"\xff", b"\x1b[31m", b"\x00", b" 50%"])
)


@given(pieces, st.data())
def test_the_same_bytes_give_the_same_lines_however_cut(parts: list[bytes], data: st.DataObject) -> None:
    """Only states of a bar that is still drawn depend on when one looks."""
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))))
    at_once, bit_by_bit = Splitter(), Splitter()
    expected = [*at_once.feed(whole), *at_once.end()]
    found = [line for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) for line in bit_by_bit.feed(whole[a:b])]
    found += bit_by_bit.end()
    assert [line for line in found if not line.progress] == [line for line in expected if not line.progress]


def test_a_bar_is_one_line() -> None:
    """While drawn: its latest state, if it changed. At its end: an ordinary line."""
    splitter = Splitter()
    assert splitter.feed(b"\r  0%|    |\r 50%|##  |") == [Line(" 50%|##  |", progress=True)]
    assert splitter.feed(b"") == []
    assert splitter.feed(b"\r100%|####|\r") == [Line("100%|####|", progress=True)]
    assert splitter.feed(b"\nnext\n") == [Line("100%|####|"), Line("next")]


def test_what_a_terminal_would_obey_is_taken_out() -> None:
    """Colours, titles, cursor movements, NUL, bells and turned text go; invalid UTF-8 shows as such."""
    data = b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07t\x00\x07\x1b(B \xff \xe2\x80\xae\xc2\x9bx\r\n"
    assert Splitter().feed(data) == [Line("red t \ufffd x")]


def test_a_long_line_is_cut_with_a_mark() -> None:
    """No line costs more than LONGEST, and nothing after it is lost."""
    lines = Splitter().feed(b"x" * (LONGEST + 7) + b"\nnext\n")
    assert lines == [Line("x" * LONGEST + " [... 7 bytes cut]"), Line("next")]


# -- following --------------------------------------------------------------------------------------------------------


def test_a_follower_reads_only_what_is_new(tmp_path: Path) -> None:
    """A file that is not there yet is empty; a line counts when it has ended, or when its writer has."""
    follower = Follower(tmp_path / "m.log")
    assert read_all(follower) == []
    write(tmp_path / "m.log", b"one\ntw")
    assert read_all(follower) == ["one"]
    write(tmp_path / "m.log", b"o\nthree")
    assert read_all(follower) == ["two"]
    assert follower.rest() == [Line("three")]
    follower.close()


def test_a_flood_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read is bounded; `more` says that the next need not wait."""
    monkeypatch.setattr(logfile, "READ", 10)
    write(tmp_path / "m.log", b"12345\n" * 5)
    follower = Follower(tmp_path / "m.log")
    assert len(follower.read_new()) == 1
    assert follower.more
    assert read_all(follower) == ["12345"] * 4
    follower.close()


def test_a_new_start_is_followed(tmp_path: Path) -> None:
    """The old file is read to its end first."""
    first = open_log(tmp_path, "m", keep=2)
    follower = Follower(first.path)
    os.write(first.fd, b"old\n")
    assert read_all(follower) == ["old"]
    os.write(first.fd, b"late\n")
    second = open_log(tmp_path, "m", keep=2)
    os.write(second.fd, b"new\n")
    assert read_all(follower) == ["late"]
    assert read_all(follower) == ["new"]
    follower.close()
    os.close(first.fd)
    os.close(second.fd)


# -- keeping ----------------------------------------------------------------------------------------------------------


def test_older_logs_move_up_and_the_oldest_go(tmp_path: Path) -> None:
    """`keep` older ones stay; the new one is empty, and readable for the group."""
    for number in range(5):
        log = open_log(tmp_path, "m", keep=2)
        os.write(log.fd, f"{number}\n".encode())
        os.close(log.fd)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "m.log": "4\n", "m.log.1": "3\n", "m.log.2": "2\n",
    }  # fmt: skip
    assert (tmp_path / "m.log").stat().st_mode & 0o777 == 0o640


def test_a_large_log_is_rotated_under_its_writer(tmp_path: Path) -> None:
    """No line is lost or read twice; the writer goes on in the same, now small, file."""
    log = open_log(tmp_path, "m", keep=2)
    follower = Follower(log.path)
    texts = []
    for number in range(10):
        os.write(log.fd, f"line {number}\n".encode())
        if log.path.stat().st_size > 20:
            texts += [line.text for line in follower.rotated(rotate(log.path, follower.at, keep=2))]
        texts += read_all(follower)
    assert texts == [f"line {number}" for number in range(10)]
    assert log.path.read_bytes() == b"line 9\n"
    assert (tmp_path / "m.log.1").read_bytes() == b"line 6\nline 7\nline 8\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.log", "m.log.1", "m.log.2"]
    assert follower.rotated(rotate(log.path, follower.at, keep=2)) == []
    os.write(log.fd, b"more than was there before\n")
    assert read_all(follower) == ["more than was there before"]
    os.close(log.fd)
    follower.close()


def test_a_full_disk_costs_old_lines_not_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for a copy the older ones go, and the log is cut all the same; it is said, not raised."""
    log = open_log(tmp_path, "m", keep=1)
    write(tmp_path / "m.log.1", b"old\n")
    os.write(log.fd, b"line\n" * 10)
    follower = Follower(log.path)
    whole = Path.open

    def full(path: Path, mode: str = "r", **more: Any) -> object:
        if "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(path, mode, **more)

    monkeypatch.setattr(Path, "open", full)
    assert len(follower.rotated(rotate(log.path, follower.at, keep=1))) == 10
    assert "No space left" in follower.trouble
    assert log.path.stat().st_size == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.log"]
    os.close(log.fd)
    follower.close()


def test_a_directory_that_cannot_be_written_is_told_not_raised(tmp_path: Path) -> None:
    """The engine gets /dev/null; reading and keeping say what is wrong."""
    (tmp_path / "file").touch()
    log = open_log(tmp_path / "file", "m", keep=1)
    assert "cannot write" in log.trouble
    os.write(log.fd, b"lost")
    os.close(log.fd)
    follower = Follower(tmp_path / "file" / "m.log")
    assert follower.read_new() == []
    assert "cannot read" in follower.trouble
    failed = rotate(follower.path, 0, keep=1)
    assert not failed.done and "cannot rotate" in failed.trouble
    assert "cannot keep" in keep_failed(tmp_path / "file", "m")


def test_the_last_failed_start_is_kept(tmp_path: Path) -> None:
    """It survives the starts after it, and the next failure replaces it."""
    for text in ("first", "second"):
        log = open_log(tmp_path, "m", keep=1)
        os.write(log.fd, text.encode())
        os.close(log.fd)
        assert keep_failed(tmp_path, "m") == ""
    for _ in range(2):
        os.close(open_log(tmp_path, "m", keep=1).fd)
    assert (tmp_path / "m.log.failed").read_text() == "second"


def test_of_a_huge_failed_start_both_ends_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning has the flags, the end the error."""
    monkeypatch.setattr(logfile, "HEAD", 10)
    monkeypatch.setattr(logfile, "FAILED", 30)
    write(tmp_path / "m.log", b"begin\n" + b"." * 1000 + b"\nend\n")
    assert keep_failed(tmp_path, "m") == ""
    kept = (tmp_path / "m.log.failed").read_bytes()
    assert kept == b"begin\n....\n[981 bytes left out]\n" + b"." * 15 + b"\nend\n"


def test_a_start_whose_log_was_rotated_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of that start and no other, one behind the other."""
    write(tmp_path / "m.log.3", b"of another start\n")
    write(tmp_path / "m.log.2", b"begin\nfl")
    write(tmp_path / "m.log.1", b"ood\n" + b"." * 50)
    write(tmp_path / "m.log", b"\nend\n")
    assert keep_failed(tmp_path, "m", parts=2) == ""
    assert (tmp_path / "m.log.failed").read_bytes() == b"begin\nflood\n" + b"." * 50 + b"\nend\n"
    monkeypatch.setattr(logfile, "HEAD", 10)
    monkeypatch.setattr(logfile, "FAILED", 30)
    assert keep_failed(tmp_path, "m", parts=2) == ""
    kept = (tmp_path / "m.log.failed").read_bytes()
    assert kept == b"begin\nfloo\n[37 bytes left out]\n" + b"." * 15 + b"\nend\n"


def test_no_name_of_a_model_gives_a_kept_log(tmp_path: Path) -> None:
    """`a` and `a.failed` may both fail."""
    for name in ("a", "a.failed"):
        log = open_log(tmp_path, name, keep=1)
        os.write(log.fd, name.encode())
        os.close(log.fd)
        assert keep_failed(tmp_path, name) == ""
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.log": "a", "a.log.failed": "a", "a.failed.log": "a.failed", "a.failed.log.failed": "a.failed",
    }  # fmt: skip


# -- a flood ----------------------------------------------------------------------------------------------------------


def test_what_was_not_read_in_time_is_left_out(tmp_path: Path) -> None:
    """A backlog is not split into lines when the log is rotated: it is told how much it was, and what follows is whole."""
    log = open_log(tmp_path, "m", keep=1)
    follower = Follower(log.path)
    os.write(log.fd, b"half")
    assert read_all(follower) == []
    os.write(log.fd, b"a line\n" * 100_000)
    lines = follower.rotated(rotate(log.path, follower.at, keep=1))
    assert [line.text for line in lines] == [
        "half", "[700000 bytes of output left out: they came faster than they can be read]",
    ]  # fmt: skip
    os.write(log.fd, b"next\n")
    assert read_all(follower) == ["next"]
    assert (follower.at, follower.line_start) == (5, 5)
    assert (tmp_path / "m.log.1").read_bytes() == b"half" + b"a line\n" * 100_000
    os.close(log.fd)
    follower.close()


def test_a_writer_that_does_not_stop_does_not_keep_a_rotation_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes while it copies, it copies what was there and a bit; what is lost is told in the copy."""
    monkeypatch.setattr(logfile, "CHUNK", 100)
    log = open_log(tmp_path, "m", keep=1)
    os.write(log.fd, b"x" * 1000)
    copy = logfile._copy

    def flooded(source: BinaryIO, target: BinaryIO, size: int) -> int:
        done = copy(source, target, size)
        os.write(log.fd, b"y" * 1000)  # as much again, meanwhile
        return done

    monkeypatch.setattr(logfile, "_copy", flooded)
    found = rotate(log.path, 1000, keep=1)
    assert found == Rotated(b"y" * 2000)  # who follows it has lost nothing
    assert (tmp_path / "m.log.1").read_bytes() == b"x" * 1000 + b"y" * 100 + b"\n[1900 bytes left out]\n"
    assert log.path.stat().st_size == 0
    os.close(log.fd)


def test_the_end_of_one_start_is_no_beginning_of_the_next(tmp_path: Path) -> None:
    """A last line without its end, and a new log under the same name."""
    first = open_log(tmp_path, "m", keep=1)
    follower = Follower(first.path)
    os.write(first.fd, b"one\nkilled in the mid")
    assert read_all(follower) == ["one"]
    os.close(first.fd)
    second = open_log(tmp_path, "m", keep=1)
    os.write(second.fd, b"new\n")
    assert read_all(follower) == ["killed in the mid", "new"]
    os.close(second.fd)
    follower.close()


# -- looking back -----------------------------------------------------------------------------------------------------


def test_tail_gives_the_last_lines(tmp_path: Path) -> None:
    """However large the file; fewer if there are fewer; none if it cannot be read."""
    write(tmp_path / "m.log", b"".join(b"line %d\n" % number for number in range(30_000)))
    assert tail(tmp_path / "m.log", 3) == ["line 29997", "line 29998", "line 29999"]
    assert len(tail(tmp_path / "m.log", 20_000)) == 20_000
    assert tail(tmp_path / "m.log", 0) == []
    assert tail(tmp_path / "none", 3) == []


def shown(path: Path, count: int = 1000, since: float | None = None, most: int = 1 << 20) -> list[str]:
    """The lines from where a reader begins."""
    with path.open("rb") as file:
        start = find_start(file.fileno(), count=count, since=since, most=most)
        assert start.end == path.stat().st_size
        return path.read_text()[start.at :].splitlines()


def test_since_gives_the_lines_from_a_time_on(tmp_path: Path) -> None:
    """vLLM's stamps have no year; lines without a stamp belong to the one before."""
    path = tmp_path / "m.log"
    write(path, b"(W pid=1) INFO 12-31 23:59:58 [a.py:1] one\n(W pid=1) INFO 01-01 00:00:05 [a.py:1] two\n  more\n")
    os.utime(path, (0, datetime(2027, 1, 1, 0, 0, 6).timestamp()))
    first = datetime(2026, 12, 31, 23, 59, 58).timestamp()
    assert [text[-4:] for text in shown(path, since=first + 1)] == [" two", "more"]
    assert len(shown(path, since=first)) == 3
    assert shown(path, since=datetime(2027, 1, 1, 0, 1).timestamp()) == []
    assert shown(path, count=1, since=first) == ["  more"]
    assert shown(path, count=0, since=first) == []
    for never in (-1e12, -1.0, 0.0):  # before every calendar: all of it
        assert len(shown(path, since=never)) == 3
    assert shown(path, since=1e18) == []


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 30_000])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_reader_begins_with_the_last_lines(tmp_path: Path, count: int, end: str) -> None:
    """As many as asked for, if there are, whether the last has ended or not; also across the blocks that are read."""
    lines = [f"line {number} " + "x" * (number % 300) for number in range(1000)]
    path = tmp_path / "m.log"
    path.write_text("\n".join(lines) + end)
    assert shown(path, count) == (lines[-count:] if count else [])


def test_no_more_than_that_is_shown(tmp_path: Path) -> None:
    """It begins with a whole line, and tells how much was asked for besides."""
    path = tmp_path / "m.log"
    write(path, b"".join(b"line %03d\n" % number for number in range(100)))
    assert shown(path, 50, most=90) == [f"line {number:03}" for number in range(90, 100)]
    assert shown(path, 50, most=89) == [f"line {number:03}" for number in range(91, 100)]
    with path.open("rb") as file:
        assert find_start(file.fileno(), count=50, most=90).left_out == 40 * 9


def test_the_end_of_a_log_may_be_in_the_part_before(tmp_path: Path) -> None:
    """A start's last words are found although its log has just been rotated."""
    write(tmp_path / "m.log.2", b"0\n")
    write(tmp_path / "m.log.1", b"1\n2\n3")
    write(tmp_path / "m.log", b"a\n4\n")
    assert tail(tmp_path / "m.log", 3, parts=1) == ["2", "3a", "4"]
    assert tail(tmp_path / "m.log", 9, parts=1) == ["1", "2", "3a", "4"]
    assert tail(tmp_path / "m.log", 9) == ["a", "4"]
