"""From the death of a process to the successor's exec, the backoff taken off: all that vllmd itself needs for it.

That is: to notice, to end the rest of the tree, to read the cause from the log, to look at the model's files again, to
spawn. The daemon's children are watched from outside, so that asking costs it nothing.
"""

import os
import select
import signal
import time
from pathlib import Path
from statistics import median

from tests.bench.figures import Figure, at_most, spread
from tests.bench.stage import UP, await_ready, fake_daemon
from tests.e2e.daemon import Daemon
from tests.e2e.processes import Process, read
from vllmd.core.policy import backoff
from vllmd.spec import RestartRule

RULE = RestartRule(backoff=0.1, backoff_max=0.1, max_failures=1000, window=1.0)
MODEL = """[models.a]
model = "{models}/tiny"
autostart = true
restart = { backoff = "100ms", backoff_max = "100ms", max_failures = 1000, window = "1s" }
"""
LIMIT = 20.0  # seconds
LOOK_EVERY = 0.001


def run(rounds: int) -> list[Figure]:
    """Leader and engine take turns."""
    times: dict[str, list[float]] = {"vllm": [], "VLLM::EngineCor": []}
    with fake_daemon(MODEL, defaults=UP) as daemon:
        for _ in range(rounds):
            for victim, took in times.items():
                took.append(crash(daemon, victim))
    named = zip(("API server", "EngineCore"), times.values(), strict=True)
    figures = []
    for name, took in named:
        detail = f"over the backoff; median of {spread(took, 1e3)}"
        figures.append(Figure(f"crash of {name}: death to exec", median(took) * 1e3, "ms", 100.0, detail))
        figures.append(Figure("... 95th percentile", at_most(took, 0.95) * 1e3, "ms"))
    return figures


def crash(daemon: Daemon, victim: str) -> float:
    """Seconds from the victim's death to the successor's exec, less the backoff. The old tree must be gone then."""
    await_ready(daemon, ["a"])
    status = daemon.client.get("/api/v1/status")
    model, boss = status["models"][0], int(status["daemon"]["pid"])
    tree = daemon.tree("a")
    pid = next((p.pid for p in tree if p.name == victim), model["pid"])
    children = Path(f"/proc/{boss}/task/{boss}/children")
    before = set(children.read_text().split())
    died = kill(pid)
    limit = died + LIMIT
    while True:
        fresh = [int(child) for child in set(children.read_text().split()) - before]
        if any(executes(child) for child in fresh):
            now = time.monotonic()
            break
        assert time.monotonic() < limit, f"no successor within {LIMIT:.0f} s"
        time.sleep(LOOK_EVERY)
    left = [old for old in tree if is_alive(old)]
    assert not left, f"the successor runs beside {left}"
    return now - died - backoff(RULE, 1, f"a:{model['attempt']}")


def kill(pid: int) -> float:
    """SIGKILL; when it was dead, on the monotonic clock."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert select.select([handle], [], [], LIMIT)[0]
        return time.monotonic()
    finally:
        os.close(handle)


def executes(pid: int) -> bool:
    """Whether it has become an engine: between fork and exec it still has its parent's command line."""
    try:
        return b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def is_alive(old: Process) -> bool:
    now = read(old.pid)
    return now is not None and now.began == old.began
