"""What may befall a running engine: its whole tree is gone before the next one starts, and it comes back by itself."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.daemon import Vllmd, fake_vllm, vllmd, weights
from tests.e2e.chat import answers
from tests.e2e.processes import TICK, Deaths, Process

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures

# Names as in /proc/PID/stat: the kernel keeps 15 characters.
PARTS = {"leader": "vllm", "engine": "VLLM::EngineCor", "worker": "VLLM::Worker"}
CAUSES = {"leader": "SIGKILL", "engine": "EngineCore", "worker": "Worker"}


def part(tree: list[Process], name: str) -> Process:
    (found,) = [process for process in tree if process.name == name]
    return found


@pytest.mark.parametrize("which", PARTS)
def test_a_killed_process_takes_its_tree_along_and_the_model_comes_back(vllmd: Vllmd, which: str) -> None:
    """SIGKILL of any one: all of the old are dead before the new leader begins; counted; `why` names what died."""
    vllmd.model("a").start()
    (before,) = vllmd.up("a")
    old, event = vllmd.tree("a"), vllmd.last_event()
    assert set(before["pids"]) == {process.pid for process in old}
    with Deaths(old) as deaths:
        os.kill(part(old, PARTS[which]).pid, signal.SIGKILL)
        crashed = vllmd.wait("a", "backoff")
        after = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] > before["attempt"])
    assert deaths.last <= part(vllmd.tree("a"), "vllm").began + TICK
    assert not set(old) & set(vllmd.tree("a"))
    assert vllmd.states("a", event) == ["stopping", "backoff", "waiting", "starting", "ready"]
    assert CAUSES[which] in crashed["why"]["text"]
    assert CAUSES[which] in vllmd.why("a")["last_failure"]
    assert (after["restarts"], after["failures"]) == (1, 1)
    assert answers(after)


def test_an_engine_that_dies_under_a_health_of_200_is_seen(vllmd: Vllmd) -> None:
    """The leader lives on and lies: the engine's own end is what counts."""
    vllmd.model("a", {"health_lie": 1}).start()
    (before,) = vllmd.up("a")
    os.kill(part(vllmd.tree("a"), PARTS["engine"]).pid, signal.SIGKILL)
    after = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] > before["attempt"])
    assert after["pid"] != before["pid"]


def test_a_grandchild_that_left_the_session_dies_before_the_next_start(vllmd: Vllmd) -> None:
    """It has neither parent nor group of the engine's: its cookie gives it away."""
    vllmd.model("a", {"escape": 1}).start()
    (before,) = vllmd.up("a")
    vllmd.wait("a", lambda m: any(p.name == "fake-escapee" for p in vllmd.tree("a")))
    old = vllmd.tree("a")
    runaway = part(old, "fake-escapee")
    assert os.getsid(runaway.pid) != before["pid"]
    with Deaths(old) as deaths:
        os.kill(before["pid"], signal.SIGKILL)
        vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] > before["attempt"])
    assert deaths.last <= part(vllmd.tree("a"), "vllm").began + TICK


@pytest.mark.parametrize("fault", ["escape", "leak_process"])
def test_a_stop_leaves_no_process(vllmd: Vllmd, fault: str) -> None:
    """A clean exit of the leader is not the end of those it left."""
    vllmd.model("a", {fault: 1}).start()
    vllmd.up("a")
    vllmd.wait("a", lambda m: any(p.name.startswith("fake-") for p in vllmd.tree("a")))
    vllmd.act("stop", "a")
    stopped = vllmd.wait("a", "stopped")
    assert vllmd.tree("a") == []
    assert (stopped["pids"], stopped["reserved"]) == ([], 0)


def run_away(daemon: Vllmd) -> Path:
    """Have every engine lose a process that sheds session, parent, environment, directory and log; their pids are in the file
    that is returned."""
    pids, wrapper = daemon.folder / "pids", daemon.folder / "vllm"
    wrapper.write_text(
        f"#!/bin/sh\nsetsid -f env -i /bin/sh -c 'cd /; echo $$ >> {pids}; exec sleep 600' >/dev/null 2>&1 </dev/null\n"
        f'exec {daemon.defaults["executable"]} "$@"\n'
    )
    wrapper.chmod(0o755)
    daemon.defaults["executable"] = wrapper
    return pids


def test_a_runaway_without_any_mark_ends_with_its_engine(vllmd: Vllmd) -> None:
    """It came to us when it lost its parent, and no other engine is there that can have made it."""
    pids = run_away(vllmd)
    vllmd.model("a").start()
    vllmd.up("a")
    (pid,) = map(int, pids.read_text().split())
    assert alive(pid)
    vllmd.act("stop", "a")
    vllmd.wait("a", "stopped")
    assert not alive(pid)


def test_no_runaway_outlives_the_daemon(vllmd: Vllmd) -> None:
    """Where two engines ran it is told that one is left; when all is ended, so are they."""
    pids = run_away(vllmd)
    vllmd.model("a").model("b").start()
    vllmd.up("a", "b")
    first, second = map(int, pids.read_text().split())
    vllmd.act("stop", "b")
    vllmd.hear(lambda line: "ran away from b or of another" in line["event"])
    assert alive(first) and alive(second)
    assert vllmd.stop() == 0
    assert not alive(first) and not alive(second)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_exit_0_is_a_crash(vllmd: Vllmd) -> None:
    """vLLM exits 0 when its engine dies: nobody asked for it, so it is restarted and told."""
    vllmd.model("a", {"exit_after": "0.2:0", "once": vllmd.folder / "once"}).start()
    (first,) = vllmd.up("a")
    crashed = vllmd.wait("a", "backoff")
    again = vllmd.wait("a", "ready")
    assert crashed["why"]["class"] in ("exited", "engine-died")  # the leader's exit, or the engine's just before it
    assert (again["attempt"], again["restarts"]) == (first["attempt"] + 1, 1)


def test_a_crash_loop_ends_failed_after_five_with_its_memory_released(vllmd: Vllmd) -> None:
    """Five attempts, growing pauses, then nothing more; the next model may have the memory."""
    vllmd.model("a", {"crash_at": "load"}).model("b").start()
    event = vllmd.last_event()
    vllmd.act("start", "a")
    held = vllmd.wait("a", "backoff")
    assert held["reserved"] == 1500 << 20  # kept while it comes back
    failed = vllmd.wait("a", "failed")
    assert failed["attempt"] == 5
    assert failed["why"]["text"].startswith("failed 5 times in 15 min")
    assert vllmd.states("a", event).count("starting") == 5
    assert failed["deadline_s"] is None
    assert (failed["reserved"], vllmd.device()["reserved"]) == (0, 0)
    assert vllmd.tree() == []
    vllmd.up("b")


def test_a_model_that_was_restarted_by_hand_begins_its_count_anew(vllmd: Vllmd) -> None:
    """`start` of a failed model forgives its past."""
    vllmd.defaults["restart"] |= {"max_failures": 2}
    vllmd.model("a", {"crash_at": "import"}).start()
    vllmd.act("start", "a")
    vllmd.wait("a", "failed")
    vllmd.act("start", "a")
    failed = vllmd.wait("a", lambda m: m["state"] == "failed" and m["attempt"] > 2)
    assert failed["attempt"] == 4


def test_a_frozen_engine_is_killed_within_hang_after(vllmd: Vllmd) -> None:
    """SIGSTOP while /health says 200: no token and no answer is what tells; tree killed, counted, restarted."""
    vllmd.model("a", hang_after="5s").start()
    (before,) = vllmd.up("a")
    old = vllmd.tree("a")
    with Deaths(old) as deaths:
        os.kill(part(old, PARTS["engine"]).pid, signal.SIGSTOP)
        frozen = time.monotonic()
        hung = vllmd.wait("a", "backoff")
        took = time.monotonic() - frozen
        vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] > before["attempt"])
    assert took < 5 + 3
    assert hung["why"]["class"] == "hung"
    assert deaths.last <= part(vllmd.tree("a"), "vllm").began + TICK
    assert 'vllmd_hangs_total{model="a"} 1.0' in vllmd.client.fetch("GET", "/metrics")[1].decode()


def test_a_start_without_a_sign_of_life_is_given_up(vllmd: Vllmd) -> None:
    """start_stall counts from the last sign, and the cause says in which phase it fell silent."""
    vllmd.model("a", {"stall_at": "load", "once": vllmd.folder / "once"}, start_stall="5s").start()
    vllmd.act("start", "a")
    stalled = vllmd.wait("a", "backoff")
    assert stalled["why"]["class"] == "stalled"
    assert "while load" in stalled["why"]["text"]
    assert vllmd.wait("a", "ready")["attempt"] == 2


def test_a_neighbour_is_untouched_by_a_crash(vllmd: Vllmd) -> None:
    """Same pids, no restart."""
    vllmd.model("a").model("b").start()
    a, b = vllmd.up("a", "b")
    os.kill(a["pid"], signal.SIGKILL)
    vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2)
    now = vllmd.look("b")
    assert (now["pids"], now["attempt"], now["restarts"]) == (b["pids"], 1, 0)
    assert answers(now)
