"""The daemon is killed and started again, with fake engines and no systemd: its models are as they were, none twice, none
lost, none left over."""

import json
import os
import random
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.daemon import Vllmd, fake_vllm, neighbour, vllmd, weights
from tests.e2e.chat import answers

__all__ = ["fake_vllm", "neighbour", "vllmd", "weights"]  # fixtures


def kill(vllmd: Vllmd) -> None:
    """SIGKILL of the daemon alone."""
    assert vllmd.stop(signal.SIGKILL) == -signal.SIGKILL


def leaders(vllmd: Vllmd, name: str) -> list[int]:
    """The session leaders of a model: one for each time that it runs."""
    return [process.pid for process in vllmd.tree(name) if os.getsid(process.pid) == process.pid]


def test_ready_models_are_adopted(vllmd: Vllmd, neighbour: "subprocess.Popen[bytes]") -> None:
    """Same pids, attempt, age and reservation; it serves; it is stopped as any other, and nothing is left."""
    vllmd.model("a", port="auto").model("b", {"escape": 1}).start()
    before = dict(zip("ab", vllmd.up("a", "b"), strict=True))
    vllmd.wait("a", lambda m: m["used"] > 0)
    trees = vllmd.tree()
    kill(vllmd)
    assert vllmd.tree() == trees
    vllmd.start()
    assert vllmd.tree() == trees
    for name in "ab":
        after = vllmd.wait(name, "ready")  # the record of the last step may not have been written
        for key in ("pid", "attempt", "reserved", "endpoint", "restarts", "state"):
            assert after[key] == before[name][key], key
        assert after["uptime_s"] >= before[name]["uptime_s"]
        assert answers(after)
    assert neighbour.poll() is None
    code, _ = vllmd.act("stop", "a")
    assert code == 202
    vllmd.wait("a", "stopped")
    assert vllmd.tree("a") == []
    (again,) = vllmd.up("a")
    assert again["attempt"] == before["a"]["attempt"] + 1


def test_an_adopted_model_that_crashes_is_restarted(vllmd: Vllmd) -> None:
    """Its end is seen though it is not our child, its status told where the kernel knows it."""
    vllmd.model("a").start()
    (before,) = vllmd.up("a")
    kill(vllmd)
    vllmd.start()
    os.kill(before["pid"], signal.SIGKILL)
    crashed = vllmd.wait("a", "backoff")
    assert "SIGKILL" in crashed["why"]["text"] or "ended" in crashed["why"]["text"]
    after = vllmd.wait("a", "ready")
    assert after["pid"] != before["pid"] and after["restarts"] == 1
    assert leaders(vllmd, "a") == [after["pid"]]


@pytest.mark.parametrize("which", ["leader", "all"])
def test_what_died_meanwhile_is_restarted(vllmd: Vllmd, which: str) -> None:
    """The leader, with its engine left behind, or all of it; the neighbour does not notice."""
    vllmd.model("a").model("b").start()
    before, b = vllmd.up("a", "b")
    kill(vllmd)
    for process in vllmd.tree("a"):
        if which == "all" or process.pid == before["pid"]:
            os.kill(process.pid, signal.SIGKILL)
    old = {process.pid for process in vllmd.tree("a")}
    vllmd.start()
    after = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2)
    assert not old & {process.pid for process in vllmd.tree("a")}
    assert (after["restarts"], after["failures"]) == (1, 1)
    # Where the engine outlived its leader for a moment, its log may know better.
    assert which == "leader" or "while vllmd was away" in vllmd.why("a")["last_failure"]
    assert vllmd.look("b")["pid"] == b["pid"]


def test_a_start_goes_on(vllmd: Vllmd) -> None:
    """Same process; its phases are known from its log; it becomes ready."""
    vllmd.model("a", {"start_s": 3.0}).start()
    vllmd.act("start", "a")
    starting = vllmd.wait("a", lambda m: m["phase"] == "load")
    kill(vllmd)
    vllmd.start()
    assert vllmd.wait("a", lambda m: m["phase"] is not None or m["state"] == "ready")["pid"] == starting["pid"]
    assert vllmd.wait("a", "ready")["pid"] == starting["pid"]


def test_a_stop_is_finished_and_stays(vllmd: Vllmd) -> None:
    """Killed while it drains: it ends all the same, and autostart does not bring it back."""
    vllmd.model("a", {"ignore_term": 1}, autostart=True, drain="1s", stop_timeout="1s").start()
    vllmd.wait("a", "ready")
    vllmd.act("stop", "a")
    vllmd.wait("a", "draining")
    kill(vllmd)
    vllmd.start()
    vllmd.wait("a", "stopped")
    assert vllmd.tree("a") == []
    kill(vllmd)
    vllmd.start()
    assert vllmd.wait("a", "stopped")["attempt"] == 1
    assert vllmd.stop() == 0
    vllmd.start()
    vllmd.wait("a", "ready")  # after a proper end the configuration decides


@pytest.mark.parametrize("damage", ["cut", "not json", "no such state", "newer", "wrong types"])
def test_a_record_that_cannot_be_read_costs_one_model_a_restart(vllmd: Vllmd, damage: str) -> None:
    """Its engine is a stray and is ended, by its mark alone; the file is set aside; the other model does not notice."""
    vllmd.model("a", autostart=True).model("b").start()
    (b,) = vllmd.up("b")
    a = vllmd.wait("a", "ready")
    kill(vllmd)
    path = vllmd.state_dir / "instances/a.json"
    whole = json.loads(path.read_bytes())
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:100])
        case "not json":
            path.write_bytes(b"\0" * 4096)
        case "no such state":
            path.write_text(json.dumps(whole | {"record": whole["record"] | {"state": "dreaming"}}))
        case "newer":
            path.write_text(json.dumps(whole | {"format": 99}))
        case _:
            path.write_text(json.dumps(whole | {"record": whole["record"] | {"attempt": "x", "held": 3}}))
    vllmd.start()
    after = vllmd.wait("a", "ready")
    assert after["pid"] != a["pid"]
    assert leaders(vllmd, "a") == [after["pid"]]
    assert vllmd.look("b")["pid"] == b["pid"]


def test_a_record_of_an_older_vllmd_is_understood(vllmd: Vllmd) -> None:
    """Fields that it does not have take their defaults, fields that we do not have are passed over."""
    vllmd.model("a").start()
    (before,) = vllmd.up("a")
    kill(vllmd)
    path = vllmd.state_dir / "instances/a.json"
    whole = json.loads(path.read_bytes())
    for key in ("phases", "figures", "restarts", "spec"):
        del whole["record"][key]
    path.write_text(json.dumps(whole | {"record": whole["record"] | {"mood": "fine"}}))
    vllmd.start()
    after = vllmd.wait("a", "ready")
    assert after["pid"] == before["pid"]
    assert answers(after)


def test_records_of_another_boot_mean_nothing(vllmd: Vllmd) -> None:
    """After a reboot its pid is somebody else's: autostart decides, and nobody is killed."""
    vllmd.model("a", port="auto").model("b", port="auto", autostart=True).start()
    vllmd.up("a")
    vllmd.wait("b", "ready")
    kill(vllmd)
    for process in vllmd.tree():
        os.kill(process.pid, signal.SIGKILL)
    with subprocess.Popen(["sleep", "600"]) as innocent:
        path = vllmd.state_dir / "instances/a.json"
        whole = json.loads(path.read_bytes())
        whole["record"]["pid"] = innocent.pid
        path.write_text(json.dumps(whole | {"boot": "0f0f0f0f-0000-0000-0000-000000000000"}))
        vllmd.start()
        vllmd.wait("b", "ready")
        assert vllmd.look("a")["state"] == "stopped"
        assert innocent.poll() is None
        innocent.kill()


def test_another_configuration_applies_to_what_is_adopted(vllmd: Vllmd) -> None:
    """Changed while no daemon ran: what must is restarted, what is gone is ended, the rest goes on."""
    vllmd.model("a").model("b").model("c").start()
    a, b, _ = vllmd.up("a", "b", "c")
    kill(vllmd)
    del vllmd.models["c"]
    vllmd.models["a"] = {"max_model_len": 256}
    vllmd.models["b"] = {"hang_after": "100s"}
    vllmd.start()
    after = vllmd.wait("a", lambda m: m["state"] == "ready" and m["pid"] != a["pid"])
    assert after["restarts"] == 0
    assert vllmd.look("b")["pid"] == b["pid"]
    vllmd.wait("b", lambda _: not vllmd.tree("c"))
    assert [model["name"] for model in vllmd.status()["models"]] == ["a", "b"]


def test_killed_at_random_moments_nothing_is_lost_or_doubled(vllmd: Vllmd) -> None:
    """Five deaths, the seed is printed; the long tests do more, under systemd."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    vllmd.model("a", autostart=True).model("b", {"start_s": 0.5}, autostart=True).model("c").start()
    for _ in range(5):
        name, verb = dice.choice("abc"), dice.choice(["start", "stop", "restart"])
        vllmd.act(verb, name)
        if dice.random() < 0.7:
            vllmd.wait(name, lambda m: m["state"] in ("starting", "ready", "stopped", "draining", "stopping"))
        wanted = {model["name"]: model["wanted"] for model in vllmd.status()["models"]}
        kill(vllmd)
        vllmd.start()
        for model, up in wanted.items():
            vllmd.wait(model, "ready" if up else "stopped")
            assert len(leaders(vllmd, model)) == (1 if up else 0)


def share_memory(vllmd: Vllmd) -> None:
    """Have every engine hold a file in /dev/shm, as vLLM does."""
    wrapper = vllmd.folder / "vllm"
    tag = f"psm_{os.getpid()}_{vllmd.folder.name[-20:]}_"
    wrapper.write_text(f'#!/bin/sh\nexec 9<>/dev/shm/{tag}$$\nexec {vllmd.defaults["executable"]} "$@"\n')
    wrapper.chmod(0o755)
    vllmd.defaults["executable"] = wrapper


def shared(vllmd: Vllmd) -> set[int]:
    """Whose files in /dev/shm are there."""
    tag = f"psm_{os.getpid()}_{vllmd.folder.name[-20:]}_"
    return {int(path.name.removeprefix(tag)) for path in Path("/dev/shm").glob(f"{tag}*")}


def test_shared_memory_of_what_died_meanwhile_is_removed(vllmd: Vllmd) -> None:
    """Nobody shows any more whose it is: it was noted while they lived."""
    share_memory(vllmd)
    vllmd.model("a").model("b").start()
    a, b = vllmd.up("a", "b")
    assert shared(vllmd) == {a["pid"], b["pid"]}
    kill(vllmd)
    for process in vllmd.tree("a"):
        os.kill(process.pid, signal.SIGKILL)
    assert shared(vllmd) == {a["pid"], b["pid"]}
    vllmd.start()
    after = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2)
    assert shared(vllmd) == {after["pid"], b["pid"]}
    assert vllmd.stop() == 0
    assert shared(vllmd) == set()
    assert sorted(path.name for path in (vllmd.state_dir / "instances").iterdir()) == []


def test_a_stray_takes_its_shared_memory_and_its_socket_along(vllmd: Vllmd) -> None:
    """Its record cannot be read, so it is ended by its mark; what it left is removed as well."""
    share_memory(vllmd)
    vllmd.model("a").start()
    (a,) = vllmd.up("a")
    kill(vllmd)
    (vllmd.state_dir / "instances/a.json").write_text("{")
    stranger = vllmd.runtime / "b.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(stranger))
        other.listen()
        vllmd.model("b").start()
        assert vllmd.tree("a") == [] and vllmd.look("a")["state"] == "stopped"
        assert shared(vllmd) == set()
        assert not Path(a["endpoint"].removeprefix("unix:")).exists()
        assert stranger.exists()  # somebody listens there
    stranger.unlink()
