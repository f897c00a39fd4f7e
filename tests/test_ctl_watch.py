"""status --watch: the frame is a function of picture and keys; the loop is run on a real terminal (a pty)."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ctl_daemon import LIMIT, Daemon, event
from tests.ctl_status import crowd, example, model, status, why
from vllmd.ctl.look import Look
from vllmd.ctl.screen import split_keys
from vllmd.ctl.table import status_text
from vllmd.ctl.watch import CHANGING, Keys, changes, frame
from vllmd.ctl.words import width

EVENTS = "GET /api/v1/events"


@pytest.mark.parametrize("size", [(100, 40), (80, 24), (60, 10), (40, 6), (200, 4)])
def test_a_frame_fits_the_screen(size: tuple[int, int]) -> None:
    """Never more lines than there are, whatever is open."""
    keys = Keys()
    for keys.pane in ("", "log"):
        for picture in (example(), crowd(), status([], [])):
            keys.text = ["line"] * 100
            lines = frame(picture, keys, Look(*size), None, True)
            devices = max(1, len(picture["devices"]))
            assert len(lines) <= max(size[1], devices + 5)
            assert not lines[-1].startswith("line")


def test_the_last_remedy_is_not_cut_where_there_is_room() -> None:
    """What stands below the table shares the screen with it, and so does the blank line between them."""
    picture = example()
    whole = status_text(picture, Look(100))[-4:]
    above = 2 + 1 + 1 + len(picture["models"]) + 1  # summary and bar, blank, heads, rows, blank
    for lines in range(above + 4 + 1, 40):
        text = frame(picture, Keys(), Look(100, lines), None, True)
        assert [line for line in text if line][-5:-1] == whole, lines


@pytest.mark.parametrize("lines", range(8, 18))
def test_what_has_no_room_below_the_table_is_counted(lines: int) -> None:
    """Never cut without a word."""
    text = frame(example(), Keys(), Look(100, lines), None, True)
    whole = status_text(example(), Look(100))[-4:]
    shown = sum(line in whole for line in text)
    cut = [line for line in text if line.endswith(" more lines: vllmctl status")]
    assert len(text) <= lines and shown < 4
    assert cut == ([f"  … {4 - shown} more lines: vllmctl status"] if shown or cut else [])


def test_the_rows_scroll_with_the_picked_one() -> None:
    """The last of 100 models can be seen and is marked."""
    keys = Keys()
    keys.picked = "model-099"
    lines = frame(crowd(), keys, Look(80, 30), None, True)
    assert any(line.startswith("○▸model-099") for line in lines)
    assert any("of 100" in line for line in lines)


def test_a_filter_leaves_what_matches() -> None:
    """By name, state or category; nothing is said too."""
    keys = Keys()
    keys.filter = "FAIL"
    text = "\n".join(frame(example(), keys, Look(100, 30), None, True))
    assert "got-ocr2" in text and "bge-m3" not in text
    keys.filter = "nothing"
    assert "No model matches." in "\n".join(frame(example(), keys, Look(100, 30), None, True))


def test_the_clock_gives_way_to_lost() -> None:
    """At the right end of the first line, in red; the picture stays."""
    first = frame(example(), Keys(), Look(100, 30, colour=True), 12.0, True)[0]
    assert first.endswith("\x1b[1;31mlost 12 s\x1b[0m")
    plain = frame(example(), Keys(), Look(100, 30), None, True)[0]
    assert re.search(r" \d\d:\d\d:\d\d$", plain) and width(plain) == 100


def test_keys_that_change_things_are_only_there_for_who_may() -> None:
    """Read-only: no dead keys."""
    assert frame(example(), Keys(), Look(100, 30), None, True)[-1] == "   ".join(CHANGING)
    assert "stop" not in frame(example(), Keys(), Look(100, 30), None, False)[-1]


def test_a_line_per_change_of_state() -> None:
    """Only of what changed, with the sentence."""
    states: dict[str, str] = {}
    assert len(changes(status([model("a"), model("b")], []), states, Look(0))) == 2
    after = status([model("a", "failed", why=why("x", "no such path")), model("b")], [])
    (line,) = changes(after, states, Look(0))
    assert line[9:] == "a: stopped → failed: no such path"
    assert changes(after, states, Look(0)) == []


def test_keys_are_split_from_what_comes_at_once() -> None:
    """Letters, arrows, and sequences that mean nothing here."""
    assert split_keys("j\x1b[A\x1bOB\x1b[15~\x1b[1;5Cq\x03\x1b") == ["j", "up", "down", "q", "quit", "escape"]


class Terminal:
    """A vllmctl on a pseudo-terminal."""

    def __init__(self, *argv: str, columns: int = 100, lines: int = 30) -> None:
        self.fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(inner)
        self.inner = inner
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        environment |= {"TERM": "xterm", "LC_ALL": "C.UTF-8"}
        command = [sys.executable, "-X", "utf8", "-m", "vllmd.ctl", *argv]
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        self.text = ""

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.inner)

    def until(self, pattern: str) -> str:
        """Read until `pattern` has been shown since the last call."""
        deadline = time.monotonic() + LIMIT
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern} not in {self.text[-3000:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.text += os.read(self.fd, 65536).decode("utf-8", "replace")
        passed, self.text = self.text[: found.end()], self.text[found.end() :]
        return passed

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT)
        os.close(self.fd)
        os.close(self.inner)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path) as running:
        running.status = example()
        running.routes = {"GET /api/v1/status": running.status, EVENTS: running.events}
        yield running


@pytest.fixture
def watching(daemon: Daemon) -> Iterator[Terminal]:
    terminal = Terminal("status", "--watch", "--socket", str(daemon.path))
    yield terminal
    terminal.close()


def test_events_change_the_screen_and_leaving_gives_it_back(daemon: Daemon, watching: Terminal) -> None:
    """Alternate screen, live rows, the last frame on the terminal, its modes as before."""
    assert "\x1b[?1049h" in watching.until("q quit")
    daemon.feed.put(event("model", model("smoldocling", "waiting", why=why("for memory"))))
    watching.until("waiting.*for memory.*q quit")
    watching.press("q")
    after = watching.until(r"\x1b\[\?1049l.*vllmctl stop chat nanonets-ocr")
    assert "smoldocling" in after
    assert watching.process.wait(LIMIT) == 0
    assert watching.modes() == watching.before


def test_keys_pick_and_act(daemon: Daemon, watching: Terminal) -> None:
    """x on a busy model asks; d drains it; a refusal is shown."""
    daemon.routes["POST /api/v1/models/dots-ocr/stop"] = (202, {})
    error = {"message": "cannot start qwen3-vl: no room", "code": "no-room"}
    daemon.routes["POST /api/v1/models/qwen3-vl/start"] = (409, {"error": error})
    watching.until("▸dots-ocr.*q quit")
    watching.press("x")
    watching.until("d drain and stop")
    assert not [what for what, _ in daemon.asked if what.startswith("POST")]
    watching.press("n")
    watching.until("q quit")
    assert daemon.asked[-1] == ("POST /api/v1/models/dots-ocr/stop", {"now": True})
    watching.press("\x1b[B")
    watching.until("▸qwen3-vl")
    watching.press("s")
    watching.until("no room.*q quit")


def test_readonly_has_no_keys_that_change_things(daemon: Daemon) -> None:
    """Whatever the socket would grant; and keys that are not there do nothing."""
    terminal = Terminal("status", "--watch", "--readonly", "--socket", str(daemon.path))
    try:
        assert "s start" not in terminal.until("q quit")
        terminal.press("sxr")
        terminal.press("\x1b[B")
        terminal.until("▸qwen3-vl")
        assert not [what for what, _ in daemon.asked if what.startswith("POST")]
    finally:
        terminal.close()


def test_sentences_move_on_without_an_event(daemon: Daemon) -> None:
    """On the screen of a watch, and in the row of a start."""
    daemon.status = status([model("m", "starting", why=why("starting, 0 s"))], [])
    daemon.routes["GET /api/v1/status"] = status([model("m", "starting", why=why("starting, 7 s"))], [])
    daemon.routes["POST /api/v1/start"] = (202, {"results": [{"model": "m", "status": 202}]})
    for argv in (["status", "--watch"], ["start", "m"]):
        terminal = Terminal(*argv, "--socket", str(daemon.path))
        try:
            terminal.until("starting, 0 s.*starting, 7 s")
        finally:
            terminal.close()


def test_a_long_line_of_why_does_not_break_the_screen(daemon: Daemon, watching: Terminal) -> None:
    """It goes on below, as a remedy is cut."""
    story = {"name": "dots-ocr", "state": "failed", "detail": "word " * 40 + "end", "why": why("x", "no", "y" * 150)}
    daemon.routes["GET /api/v1/models/dots-ocr/why"] = story
    watching.until("q quit")
    watching.press("w")
    screen = watching.until("word end.*why of dots-ocr").rpartition("\x1b[H")[2]
    assert [
        line for line in screen.replace("\r", "").split("\n") if width(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)) > 100
    ] == []


def test_log_and_why_open_in_place(daemon: Daemon, watching: Terminal) -> None:
    """l and w show, escape goes back."""
    body = b'{"text": "loading \\u001b[2Jweights"}\n'
    daemon.routes["GET /api/v1/models/dots-ocr/logs"] = (
        f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    daemon.routes["GET /api/v1/models/dots-ocr/why"] = {"name": "dots-ocr", "state": "ready", "why": None}
    watching.until("q quit")
    watching.press("l")
    watching.until("loading \N{REPLACEMENT CHARACTER}\\[2Jweights.*log of dots-ocr")
    watching.press("\x1b")
    watching.until("up/down pick")
    watching.press("w")
    watching.until("nothing is wrong with it.*why of dots-ocr")


def test_a_lost_connection_is_said_and_mended(daemon: Daemon, watching: Terminal) -> None:
    """The picture stays; the keys that change things go; then all is as before."""
    watching.until("s start.*q quit")
    daemon.routes[EVENTS] = b""
    daemon.feed.put(None)
    watching.until("lost \\d+ s.*up/down pick   l log")
    daemon.routes[EVENTS] = daemon.events
    watching.until("s start.*q quit")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_terminal_back(watching: Terminal, number: signal.Signals) -> None:
    """Ctrl-C is a way to quit; SIGTERM ends with its own code."""
    watching.until("q quit")
    watching.process.send_signal(number)
    watching.until(r"\x1b\[\?1049l")
    assert watching.process.wait(LIMIT) == (0 if number is signal.SIGINT else 143)
    assert watching.modes() == watching.before


def test_a_start_draws_its_row_and_wipes_it(daemon: Daemon) -> None:
    """On a terminal the row alone, redrawn in place, then one line that stays."""
    answer: dict[str, Any] = {"results": [{"model": "qwen3-vl", "status": 202}]}
    daemon.routes["POST /api/v1/start"] = (202, answer)
    terminal = Terminal("start", "qwen3-vl", "--socket", str(daemon.path))
    try:
        terminal.until("qwen3-vl .*weights 62 %, 55 s left")
        daemon.feed.put(event("model", model("qwen3-vl", "ready", reserved=6.2, used=5.9, usual_s=58.0)))
        terminal.until(r"\x1b\[1A\r\x1b\[Jqwen3-vl ready after 4\d s \(usually 58 s\), 5.9 of 6.2 GiB\r\n")
        assert terminal.process.wait(LIMIT) == 0
    finally:
        terminal.close()


def test_into_a_pipe_it_is_a_line_per_change(daemon: Daemon) -> None:
    """No escape sequence; a log that can be read later."""
    command = [sys.executable, "-m", "vllmd.ctl", "status", "--watch", "--socket", str(daemon.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(8)]
        assert first[0][8:] == " dots-ocr: ready\n"
        daemon.feed.put(event("model", model("smoldocling", "waiting")))
        assert process.stdout.readline()[8:] == " smoldocling: stopped → waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
