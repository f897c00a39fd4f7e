"""From the kill of a process to the successor's exec, the backoff taken off: all that vllmd itself needs for it.

That is: to notice, to end the rest of the tree, to read the cause from the log, to look at the model's files again, to
spawn. The daemon's children are watched from outside, so that asking costs it nothing.
"""

import os
import signal
import time
from pathlib import Path
from statistics import median

from tests.bench.figures import Figure, at_most, middle, spread
from tests.bench.stage import UP, await_ready, fake_daemon
from tests.e2e.daemon import Daemon
from tests.e2e.processes import Deaths
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
    times: dict[str, list[tuple[float, float]]] = {"vllm": [], "VLLM::EngineCor": []}
    with fake_daemon(MODEL, defaults=UP) as daemon:
        for _ in range(rounds):
            for victim, took in times.items():
                took.append(crash(daemon, victim))
    figures = []
    for name, took in zip(("API server", "EngineCore"), times.values(), strict=True):
        over, gone = [each[0] for each in took], [each[1] for each in took]
        detail = f"over the backoff; median of {spread(over, 1e3)}"
        figures += [
            Figure(f"crash: SIGKILL of {name} to successor's exec", median(over) * 1e3, "ms", 100.0, detail),
            Figure("... 95th percentile", at_most(over, 0.95) * 1e3, "ms"),
            middle("... SIGKILL to the last of the old tree gone", gone, "ms", None, "always before the exec"),
        ]
    return figures


def crash(daemon: Daemon, victim: str) -> tuple[float, float]:
    """Seconds from the kill to the successor's exec, less the backoff, and to the end of the old tree, which must come
    first."""
    await_ready(daemon, ["a"])
    status = daemon.client.get("/api/v1/status")
    model, boss = status["models"][0], int(status["daemon"]["pid"])
    tree = daemon.tree("a")
    pid = next((p.pid for p in tree if p.name == victim), model["pid"])
    children = Path(f"/proc/{boss}/task/{boss}/children")
    with Deaths(tree) as deaths:
        before = set(children.read_text().split())
        began = clock()
        os.kill(pid, signal.SIGKILL)
        while not any(executes(int(child)) for child in set(children.read_text().split()) - before):
            assert clock() < began + LIMIT, f"no successor within {LIMIT:.0f} s"
            time.sleep(LOOK_EVERY)
        now = clock()
    assert deaths.last <= now, f"the successor runs beside {[p for p, at in deaths.at.items() if at > now]}"
    return now - began - backoff(RULE, 1, f"a:{model['attempt']}"), deaths.last - began


def clock() -> float:
    """The clock of Deaths."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def executes(pid: int) -> bool:
    """Whether it has become an engine: between fork and exec it still has its parent's command line."""
    try:
        return b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
