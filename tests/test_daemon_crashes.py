"""What may befall a running engine: its whole tree is gone before the next one starts, and it comes back by itself."""

import os
import signal
from pathlib import Path

import pytest

from tests.daemon import Vllmd
from tests.e2e.chat import answers
from tests.e2e.processes import TICK, Deaths, Process

pytest_plugins = ["tests.daemon"]

# Names as in /proc/PID/stat: the kernel keeps 15 characters.
PARTS = {"leader": "vllm", "engine": "VLLM::EngineCor", "worker": "VLLM::Worker"}
CAUSES = {"leader": "SIGKILL", "engine": "EngineCore", "worker": "Worker"}


def part(tree: list[Process], which: str) -> Process:
    (found,) = [process for process in tree if process.name == PARTS[which]]
    return found


@pytest.mark.parametrize("which", PARTS)
def test_a_killed_process_takes_its_tree_along_and_the_model_comes_back(vllmd: Vllmd, which: str) -> None:
    """SIGKILL of any one: all of the old are dead before the new leader begins; counted; `why` names what died."""
    vllmd.model("a").start()
    (before,) = vllmd.up("a")
    old, event = vllmd.tree("a"), vllmd.last_event()
    assert set(before["pids"]) == {process.pid for process in old}
    with Deaths(old) as deaths:
        os.kill(part(old, which).pid, signal.SIGKILL)
        crashed = vllmd.wait("a", "backoff")
        after = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] > before["attempt"])
    leader = next(process for process in vllmd.tree("a") if process.pid == after["pid"])
    assert deaths.last <= leader.began + TICK
    assert not set(old) & set(vllmd.tree("a"))
    assert vllmd.states("a", event) == ["stopping", "backoff", "waiting", "starting", "ready"]
    assert CAUSES[which] in crashed["why"]["text"]
    assert CAUSES[which] in vllmd.why("a")["last_failure"]
    assert (after["restarts"], after["failures"]) == (1, 1)
    assert answers(after)
