"""How long a whole vllmctl takes, beside a bare Python and one with http.client, round by round in one run."""

import os
import pty
import subprocess
import sys
import time
from statistics import median

from tests.bench.figures import Figure, middle, spread
from tests.bench.stage import await_ready, fake_daemon, tables
from tests.e2e.daemon import BIN, Daemon

BASE = "python -c 'import http.client'"
JSON, TABLE = "vllmctl status --json, 100 models, 8 ready", "vllmctl status on a terminal, 100 models, 8 ready"
TARGETS = {JSON: 90.0, TABLE: 150.0}  # milliseconds where BASE takes IDLE_BASE; a busy machine slows both
IDLE_BASE = 48.0


def run(rounds: int) -> list[Figure]:
    """The daemon is real, its engines are fakes."""
    with fake_daemon(tables(8, 100)) as daemon:
        await_ready(daemon, [f"m{n:03}" for n in range(8)])
        times = measure(daemon, rounds)
    figures = [middle(name, took, "ms", TARGETS.get(name)) for name, took in times.items()]
    for name, target in TARGETS.items():
        ratios = [took / base for took, base in zip(times[name], times[BASE], strict=True)]
        said = f"median of {spread(ratios)}"
        figures.append(Figure(f"... {name.partition(',')[0]} / {BASE}", median(ratios), "x", target / IDLE_BASE, said))
    return figures


def measure(daemon: Daemon, rounds: int) -> dict[str, list[float]]:
    """Alternating, so that a busy machine slows all of them; the first round is not counted."""
    ctl = [str(BIN / "vllmctl"), "--socket", str(daemon.socket), "status"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        BASE: [sys.executable, "-c", "import http.client"],
        JSON: [*ctl, "--json"],
    }
    times: dict[str, list[float]] = {name: [] for name in [*commands, TABLE]}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            times[name].append(time.perf_counter() - began)
        times[TABLE].append(on_terminal(ctl))
    return {name: took[1:] for name, took in times.items()}


def on_terminal(command: list[str]) -> float:
    """Seconds of one run whose output is a terminal, until its last byte was read."""
    ours, theirs = pty.openpty()
    began = time.perf_counter()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        try:
            while os.read(ours, 65536):
                continue
        except OSError:  # how a terminal says that nobody has it open any more
            pass
        process.wait()
        took = time.perf_counter() - began
    os.close(ours)
    assert process.returncode == 0
    return took
