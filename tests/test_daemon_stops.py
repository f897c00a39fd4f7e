"""Stopping: in every phase of a start, with requests in flight, at once, and from all sides at the same time."""

import os
import random
import signal
import threading
import time
from typing import Any

import pytest

from tests.daemon import LIMIT, Vllmd, fake_vllm, vllmd, weights
from tests.e2e.chat import answers, ask

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures

# FAKE_STALL_AT -> what status says there
PHASES = {
    "import": "starting the process",
    "config": "importing vLLM API server",
    "engine": "importing vLLM engine",
    "worker": "importing vLLM worker",
    "download": "downloading 0 of 2",
    "load": "loading weights 0 of 1",
    "profile": "measuring memory",
    "compile": "compiling",
    "graphs": "capturing graphs",
    "http": "capturing graphs",
}
VERBS = ("start", "start", "stop", "restart")


class Request(threading.Thread):
    """One chat request of `tokens` tokens, streamed; `reason` is how it ended, None when it was cut off."""

    def __init__(self, model: dict[str, Any], tokens: int) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        self.reason: str | None = None
        self._model, self._tokens = model, tokens
        self.start()
        assert self.begun.wait(LIMIT)

    def run(self) -> None:
        try:
            connection, response = ask(self._model, max_tokens=self._tokens, stream=True)
            try:
                for line in response:
                    self.begun.set()
                    if b'"finish_reason": "' in line or b'"finish_reason":"' in line:
                        self.reason = "finished"
            finally:
                connection.close()
        except (OSError, ValueError):
            return  # the end of the engine, seen from here
        finally:
            self.begun.set()

    def over(self) -> str | None:
        self.join(LIMIT)
        assert not self.is_alive()
        return self.reason


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_in_any_phase_of_a_start_leaves_nothing(vllmd: Vllmd, phase: str) -> None:
    """SIGTERM would be swallowed there: the tree is killed, the memory free, and the next start is a normal one."""
    once = vllmd.folder / "once"
    fake = {"stall_at": phase, "download": 2, "device": "cuda", "once": once}
    args = {"enforce-eager": False}  # else there are no graphs
    vllmd.model("a", fake, args=args, env={"CXX": "true"}).start()
    vllmd.act("start", "a")
    vllmd.wait("a", lambda m: once.exists() and m["state"] == "starting" and PHASES[phase] in m["why"]["text"])
    code, answer = vllmd.act("stop", "a")
    assert code == 202, answer
    stopped = vllmd.wait("a", "stopped")
    assert vllmd.tree() == []
    assert (stopped["reserved"], vllmd.device()["reserved"]) == (0, 0)
    assert (stopped["restarts"], stopped["failures"], stopped["why"]) == (0, 0, None)
    assert answers(vllmd.up("a")[0])


def test_a_stop_lets_running_requests_finish(vllmd: Vllmd) -> None:
    """It drains: no new work, the answer that is under way complete, then it ends by itself."""
    vllmd.model("a", {"tokens_per_s": 20}, drain="30s").start()
    (a,) = vllmd.up("a")
    request = Request(a, 20)
    event = vllmd.last_event()
    vllmd.act("stop", "a")
    assert vllmd.wait("a", lambda m: m["state"] != "ready")["state"] == "draining"
    vllmd.wait("a", "stopped")
    assert request.over() == "finished"
    assert vllmd.states("a", event) == ["draining", "stopping", "stopped"]


def test_a_stop_now_cuts_requests_off(vllmd: Vllmd) -> None:
    """The drain is skipped, also one that is under way."""
    vllmd.model("a", {"tokens_per_s": 2}, drain="50s").start()
    (a,) = vllmd.up("a")
    request = Request(a, 200)
    vllmd.act("stop", "a")
    vllmd.wait("a", "draining")
    began = time.monotonic()
    vllmd.act("stop", "a", now=True)
    vllmd.wait("a", "stopped")
    assert time.monotonic() - began < 5
    assert request.over() is None


def test_the_drain_is_bounded(vllmd: Vllmd) -> None:
    """drain + stop_timeout after the stop it is gone, whatever its requests want."""
    vllmd.model("a", {"tokens_per_s": 2}, drain="1s", stop_timeout="1s").start()
    (a,) = vllmd.up("a")
    request = Request(a, 200)
    began = time.monotonic()
    vllmd.act("stop", "a")
    vllmd.wait("a", "stopped")
    assert time.monotonic() - began < 2 + 3
    assert request.over() is None


def test_an_engine_that_ignores_sigterm_is_killed_in_time(vllmd: Vllmd) -> None:
    """stop_timeout after the drain."""
    vllmd.model("a", {"ignore_term": 1}, drain="0s", stop_timeout="1s").start()
    vllmd.up("a")
    event = vllmd.last_event()
    began = time.monotonic()
    vllmd.act("stop", "a")
    stopped = vllmd.wait("a", "stopped")
    assert 0.9 < time.monotonic() - began < 1 + 3
    assert vllmd.states("a", event) == ["draining", "stopping", "stopped"]
    assert stopped["why"] is None  # asked for: no failure


def test_a_stop_during_the_pause_after_a_crash_ends_the_restarts(vllmd: Vllmd) -> None:
    """Backoff, then stopped, and it stays so: there is no deadline left."""
    vllmd.model("a", restart={"backoff": "1h", "backoff_max": "1h"}).start()
    (a,) = vllmd.up("a")
    os.kill(a["pid"], signal.SIGKILL)
    vllmd.wait("a", "backoff")
    assert vllmd.act("stop", "a")[0] == 202
    stopped = vllmd.wait("a", "stopped")
    assert (stopped["deadline_s"], stopped["reserved"], stopped["wanted"]) == (None, 0, False)


def test_a_start_during_a_stop_follows_it(vllmd: Vllmd) -> None:
    """Accepted at once; the old one drains, the new one is another attempt."""
    vllmd.model("a", {"tokens_per_s": 20}).start()
    (a,) = vllmd.up("a")
    request = Request(a, 10)
    vllmd.act("stop", "a")
    vllmd.wait("a", "draining")
    assert vllmd.act("start", "a")[0] == 202
    again = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2)
    assert request.over() == "finished"
    assert again["restarts"] == 0


def test_twenty_clients_start_two_models_at_once(vllmd: Vllmd) -> None:
    """Each model is started once, and everybody is told 202 or 200."""
    vllmd.model("a", {"start_s": 1}).model("b", {"start_s": 1}).start()
    codes: list[int] = []
    gate = threading.Barrier(20)

    def client(name: str) -> None:
        gate.wait(LIMIT)
        codes.append(vllmd.act("start", name)[0])

    threads = [threading.Thread(target=client, args=("ab"[n % 2],)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(codes) == 20 and set(codes) <= {200, 202}
    assert vllmd.act("start", "a")[0] in (200, 202)  # ready, or starting by now
    for name in "ab":
        vllmd.wait(name, "ready")
        assert vllmd.look(name)["attempt"] == 1
        assert sum(process.name == "vllm" for process in vllmd.tree(name)) == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_hammering(vllmd: Vllmd, seed: int) -> None:
    """Sixty wishes from five threads: each is answered, no two trees of one model, and in the end all is accounted for."""
    vllmd.devices["limit"] = "3GiB"  # two of the three
    vllmd.defaults |= {"drain": "1s", "stop_timeout": "1s", "queue_timeout": "5s"}
    for name in "abc":
        vllmd.model(name, {"start_s": 0.2})
    vllmd.start()
    rng = random.Random(seed)
    wishes = [[(rng.choice(VERBS), rng.choice("abc"), rng.random() < 0.3) for _ in range(12)] for _ in range(5)]
    codes: list[int] = []
    crowded: list[str] = []

    def client(mine: list[tuple[str, str, bool]]) -> None:
        for verb, name, now in mine:
            codes.append(vllmd.act(verb, name, **({"now": True} if now else {}))[0])
            leaders = [process for process in vllmd.tree(name) if process.name == "vllm"]
            crowded.extend([name] if len({process.cookie for process in leaders}) > 1 else [])

    threads = [threading.Thread(target=client, args=(mine,)) for mine in wishes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(codes) == 60 and set(codes) <= {200, 202, 409}, codes
    assert crowded == []
    for name in "abc":
        settled = vllmd.wait(name, lambda m: m["state"] in ("ready", "stopped", "failed"))
        assert settled["state"] != "failed" or settled["why"]["class"] == "no-room"  # it was accepted, and others came
    for name in "abc":
        vllmd.act("stop", name, now=True)
        vllmd.wait(name, "stopped")
    assert vllmd.tree() == []
    assert vllmd.device()["reserved"] == 0
    vllmd.up("a", "b")


def test_ctrl_c_ends_all_models_once_their_requests_are_done(vllmd: Vllmd) -> None:
    """SIGINT in a terminal: every model drains, exit code 0, nothing is left."""
    vllmd.model("a", {"tokens_per_s": 20}).model("b").start()
    a, _ = vllmd.up("a", "b")
    request = Request(a, 20)
    assert vllmd.stop(signal.SIGINT) == 0
    assert request.over() == "finished"
    assert vllmd.tree() == []
    assert not vllmd.socket.exists()


def test_a_second_ctrl_c_skips_the_drain(vllmd: Vllmd) -> None:
    """Who presses it again does not want to wait."""
    vllmd.model("a", {"tokens_per_s": 2}, drain="50s").start()
    (a,) = vllmd.up("a")
    request = Request(a, 200)
    assert vllmd.process is not None
    vllmd.process.send_signal(signal.SIGINT)
    vllmd.wait("a", "draining")
    began = time.monotonic()
    assert vllmd.stop(signal.SIGINT) == 0
    assert time.monotonic() - began < 5
    assert request.over() is None


def test_sigterm_ends_a_model_that_is_starting(vllmd: Vllmd) -> None:
    """At once: there is nothing to drain."""
    vllmd.model("a", {"stall_at": "load"}, drain="50s", autostart=True).start()
    vllmd.wait("a", lambda m: m["phase"] == "load")
    began = time.monotonic()
    assert vllmd.stop() == 0
    assert time.monotonic() - began < 5


def test_all_and_category_act_on_what_they_name(vllmd: Vllmd) -> None:
    """vllmctl start --category, stop --all; the others are left alone."""
    vllmd.model("a", category=["ocr"]).model("b", category=["ocr", "vlm"]).model("c", category=["llm"]).start()
    done = vllmd.ctl("start", "--category", "ocr")
    assert done.returncode == 0, done.stderr
    assert [vllmd.look(name)["state"] for name in "abc"] == ["ready", "ready", "stopped"]
    assert vllmd.ctl("stop", "--category", "vlm").returncode == 0
    assert [vllmd.look(name)["state"] for name in "abc"] == ["ready", "stopped", "stopped"]
    assert vllmd.ctl("start", "--all").returncode == 0
    assert [vllmd.look(name)["state"] for name in "abc"] == ["ready"] * 3
    assert vllmd.ctl("stop", "--all").returncode == 0
    assert vllmd.tree() == []


@pytest.mark.parametrize(("port", "scheme"), [("auto", "http://127.0.0.1:"), (None, "unix:")])
def test_a_model_serves_where_status_says(vllmd: Vllmd, port: str | None, scheme: str) -> None:
    """A free port for "auto", its own unix socket without a port; both answer."""
    keys: dict[str, Any] = {"port": port} if port else {}
    vllmd.model("a", **keys).start()
    (a,) = vllmd.up("a")
    assert a["endpoint"].startswith(scheme)
    assert answers(a)
