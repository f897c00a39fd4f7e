"""A real engine loses one of its processes, or freezes: nothing of it is left, and it serves again by itself."""

import os
import signal
import time

import pytest

from tests.e2e.chat import answers
from tests.e2e.conftest import Report
from tests.e2e.daemon import Daemon, Start
from tests.e2e.processes import TICK, Deaths, Process

# Names as in /proc/PID/stat: the kernel keeps 15 characters.
PARTS = {"API server": "vllm", "EngineCore": "VLLM::EngineCor", "Worker": "VLLM::Worker"}
CAUSES = {"API server": "SIGKILL", "EngineCore": "EngineCore", "Worker": "Worker"}
HANG_AFTER = 20.0


@pytest.fixture(scope="module")
def daemon(start: Start, report: Report) -> Daemon:
    running = start(
        '[models.alpha]\nmodel = "{models}/alpha"\nport = "auto"\n'
        f'hang_after = "{HANG_AFTER:.0f}s"\nrestart = {{ max_failures = 20 }}\n'
    )
    done = running.ctl("start", "alpha")
    assert done.code == 0, done.err
    report("first start, caches cold, eager", done.seconds)
    return running


def part(tree: list[Process], which: str) -> Process:
    (process,) = [process for process in tree if process.name == PARTS[which]]
    return process


@pytest.mark.parametrize("which", PARTS)
def test_killed_part_takes_its_tree_along_and_the_model_comes_back(daemon: Daemon, which: str, report: Report) -> None:
    """SIGKILL of any one process: all are dead before the next leader starts, the restart is counted, `why` names it."""
    before, events = daemon.wait("alpha", lambda m: m["state"] == "ready"), daemon.last_event()
    old = daemon.tree("alpha")
    assert set(before["pids"]) == {process.pid for process in old}
    with Deaths(old) as deaths:
        os.kill(part(old, which).pid, signal.SIGKILL)
        killed = time.monotonic()
        crashed = daemon.wait("alpha", lambda m: m["state"] == "backoff")
        noticed = time.monotonic() - killed
        why = daemon.ctl("why", "alpha").out
        after = daemon.wait("alpha", lambda m: m["state"] == "ready" and m["attempt"] > before["attempt"])
        back = time.monotonic() - killed
    new = daemon.tree("alpha")
    leader = next(process for process in new if process.pid == after["pid"])

    assert deaths.last <= leader.began + TICK
    assert not set(old) & set(new)
    assert after["restarts"] == before["restarts"] + 1
    assert CAUSES[which] in crashed["why"]["text"]
    assert CAUSES[which] in why
    assert daemon.states("alpha", events, "ready") == ["stopping", "backoff", "waiting", "starting", "ready"]
    assert answers(after)
    report(f"SIGKILL of {which}: tree dead and told", noticed)
    report(f"SIGKILL of {which}: last death to next leader", leader.began - deaths.last)
    report(f"SIGKILL of {which}: ready again", back)
    report(f"SIGKILL of {which}: why", crashed["why"]["text"])


def test_frozen_engine_is_found_within_hang_after(daemon: Daemon, report: Report) -> None:
    """SIGSTOP of EngineCore, while /health still says 200: found within hang_after, killed as a tree, restarted."""
    before = daemon.wait("alpha", lambda m: m["state"] == "ready")
    old = daemon.tree("alpha")
    with Deaths(old) as deaths:
        os.kill(part(old, "EngineCore").pid, signal.SIGSTOP)
        frozen = time.monotonic()
        hung = daemon.wait("alpha", lambda m: m["state"] == "backoff")
        found = time.monotonic() - frozen
        after = daemon.wait("alpha", lambda m: m["state"] == "ready" and m["attempt"] > before["attempt"])
        back = time.monotonic() - frozen
    new = daemon.tree("alpha")
    leader = next(process for process in new if process.pid == after["pid"])

    # The kill itself, and the tree's end, come on top.
    assert found <= HANG_AFTER + 2
    assert hung["why"]["class"] == "hung"
    assert deaths.last <= leader.began + TICK
    assert after["restarts"] == before["restarts"] + 1
    assert daemon.said("engine hung")
    assert answers(after)
    report(f"SIGSTOP of EngineCore, hang_after {HANG_AFTER:.0f} s: found and killed", found)
    report("SIGSTOP of EngineCore: ready again", back)
    report("SIGSTOP of EngineCore: why", hung["why"]["text"])
