"""`make run`, as somebody at a terminal sees it, and as a script does."""

import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Report
from tests.e2e.daemon import ROOT
from tests.e2e.processes import find, shared_memory
from vllmd.places import mark_of

DEMO = ROOT / "packaging/demo/demo.py"
LIMIT = 400.0  # seconds
SHOWN = (
    "$ vllmctl start alpha beta", "alpha ready after", "beta ready after", "2 of 3 models up",
    "$ vllmctl start gamma", "cannot start gamma: needs", "of 3.5 GiB left",
    "alpha at http://127.0.0.1:", "beta at http://127.0.0.1:", "question: ", "answer: ", "vllmctl status --watch",
    ": vllmd gamma is waiting", "s  answer: ",
)  # fmt: skip


class Terminal:
    """The demo on a terminal of its own."""

    def __init__(self, engine: Path, home: Path) -> None:
        self.text = ""
        self._fd, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 100))
        env = {key: value for key, value in os.environ.items() if key != "VLLMD_DEMO_ONCE"}
        self.process = subprocess.Popen(
            [sys.executable, DEMO, engine, home], env=env, preexec_fn=lambda: os.login_tty(slave)
        )
        os.close(slave)

    def read(self, until: str) -> None:
        """Read until this was printed; "" = until the end."""
        limit = time.monotonic() + LIMIT
        while not until or until not in self.text:
            assert time.monotonic() < limit, self.text
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # the other end is closed
                data = b""
            if not data:
                assert not until, f"it ended:\n{self.text}"
                return
            self.text += data.decode(errors="replace")

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def close(self) -> None:
        os.close(self._fd)  # hangs up


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "run"


@pytest.fixture
def terminal(engine: Path, home: Path) -> Iterator[Terminal]:
    running = Terminal(engine, home)
    yield running
    running.close()
    running.process.wait(LIMIT)


def check_nothing_left(home: Path) -> None:
    """No process, no socket, no scratch of an engine."""
    assert find(mark_of(home / "state")) == []
    assert [str(path) for path in home.rglob("*") if path.is_socket()] == []
    assert [str(path) for path in (home / "run").rglob("*") if not path.is_dir()] == []


def test_ctrl_c_ends_everything_once(terminal: Terminal, home: Path, report: Report) -> None:
    """All is shown on a terminal, and it waits; Ctrl-C ends models and vllmd, asked once, and nothing is left."""
    began = time.monotonic()
    terminal.read("Ctrl-C stops everything.")
    report("demo, first run, all shown", time.monotonic() - began)
    tree = find(mark_of(home / "state"))
    shared = shared_memory(tree)
    assert {"vllm", "VLLM::EngineCor", "VLLM::Worker"} <= {process.name for process in tree}
    pressed = time.monotonic()
    terminal.press(b"\x03")
    terminal.read("")
    report("demo, Ctrl-C until all is gone", time.monotonic() - pressed)
    assert terminal.process.wait(LIMIT) == 0
    assert "All stopped." in terminal.text
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text)
    assert [words for words in SHOWN if words not in text] == []
    assert (home / "vllmd.log").read_text().count("ending 2 models") == 1
    assert [path for path in shared if path.exists()] == []
    check_nothing_left(home)


def test_script_sees_the_same_and_it_ends_by_itself(engine: Path, home: Path, report: Report) -> None:
    """Without a terminal nothing waits for Ctrl-C; the set-up of the first run is not done again."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, DEMO, engine, home], env={**os.environ, "VLLMD_DEMO_ONCE": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    report("demo, second run, to its end", time.monotonic() - began)
    assert done.returncode == 0, done.stdout
    assert [words for words in SHOWN if words not in done.stdout] == []
    assert "All stopped." in done.stdout
    check_nothing_left(home)


def test_missing_engine_is_said_in_one_line(tmp_path: Path) -> None:
    """No traceback: what is missing, and what to do."""
    done = subprocess.run(
        [sys.executable, DEMO, tmp_path / "none", tmp_path / "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"demo: cannot find {tmp_path}/none/bin/vllm (make engine)\n"
    assert not (tmp_path / "run").exists()
