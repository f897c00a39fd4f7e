"""Configuration under a living daemon, and daemons that come after one another: broken files, reloads, leftovers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.daemon import LIMIT, Vllmd, fake_vllm, neighbour, vllmd, weights
from tests.e2e.processes import read

__all__ = ["fake_vllm", "neighbour", "vllmd", "weights"]  # fixtures


def test_a_broken_configuration_ends_the_daemon_with_all_problems(vllmd: Vllmd) -> None:
    """Exit 78, each problem with its line; nothing was started, no directory made."""
    vllmd.model("a", autostart=True, vrm="2GiB").model("b", port=70000).model("c", restart={"max_failures": 0})
    vllmd.write()
    vllmd.spawn()
    assert vllmd.ended() == 78
    for key in ("models.a.vrm", "models.b.port", "models.c.restart.max_failures"):
        (line,) = [line for line in vllmd.said.splitlines() if key in line]
        assert line.startswith(f"{vllmd.config}:")
    assert "3 problems" in vllmd.said
    assert not vllmd.state_dir.exists()


def test_a_broken_reload_changes_nothing(vllmd: Vllmd) -> None:
    """422 with every problem, the old configuration stays, the models do not notice."""
    vllmd.model("a").model("b").start()
    (a,) = vllmd.up("a")
    good = vllmd.config.read_text()
    vllmd.config.write_text(good + '\n[models.c]\nvram = "9 Gb"\nmdel = "x"\n')
    response, raw = vllmd.client.fetch("POST", "/api/v1/reload", {})
    assert response.status == 422
    assert b"models.c.vram" in raw and b"models.c.mdel" in raw
    now = vllmd.look("a")
    assert (now["pids"], now["state"]) == (a["pids"], "ready")
    assert [model["name"] for model in vllmd.status()["models"]] == ["a", "b"]
    vllmd.up("b")


def test_sighup_reloads(vllmd: Vllmd) -> None:
    """A model that is new appears, one that is gone stops and goes, one that is the same keeps its pids."""
    vllmd.model("a").model("b").start()
    a, _ = vllmd.up("a", "b")
    del vllmd.models["b"]
    vllmd.model("c", autostart=True).write()
    assert vllmd.process is not None
    vllmd.process.send_signal(signal.SIGHUP)
    vllmd.wait("c", "ready")
    vllmd.wait("a", lambda _: [model["name"] for model in vllmd.status()["models"]] == ["a", "c"])
    assert vllmd.look("a")["pids"] == a["pids"]
    assert vllmd.tree("b") == []


def test_sighup_with_a_broken_file_says_so(vllmd: Vllmd) -> None:
    """In the log, with file and line; the daemon goes on."""
    vllmd.model("a").start()
    (a,) = vllmd.up("a")
    vllmd.config.write_text("[models.a\n")
    assert vllmd.process is not None
    vllmd.process.send_signal(signal.SIGHUP)
    told = vllmd.hear(lambda line: "configuration not reloaded" in line["event"])
    assert "the old one stays" in told["event"] and f"{vllmd.config}:1" in told["first"]
    assert vllmd.look("a")["pids"] == a["pids"]


def test_a_reload_restarts_only_what_changed(vllmd: Vllmd) -> None:
    """A flag of one: drained and started anew with it; the other keeps its pids."""
    vllmd.model("a").model("b").start()
    a, b = vllmd.up("a", "b")
    vllmd.models["a"]["max_model_len"] = 256
    assert vllmd.reload()[0] == 200
    again = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2)
    assert again["pid"] != a["pid"]
    argv = vllmd.client.get("/api/v1/models/a")["argv"]
    assert argv[argv.index("--max-model-len") + 1] == "256"
    assert vllmd.look("b")["pids"] == b["pids"]


def test_the_restart_policy_can_be_changed_while_a_model_runs(vllmd: Vllmd) -> None:
    """Live: no restart for it, and the next crash is answered by the new rule, with the old crashes still counted."""
    vllmd.model("a").start()
    (a,) = vllmd.up("a")
    os.kill(a["pid"], signal.SIGKILL)
    second = vllmd.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2)
    vllmd.models["a"]["restart"] = {"max_failures": 2}
    assert vllmd.reload()[0] == 200
    assert vllmd.look("a")["pids"] == second["pids"]
    os.kill(second["pid"], signal.SIGKILL)
    failed = vllmd.wait("a", lambda m: m["state"] in ("failed", "backoff"))
    assert failed["state"] == "failed"
    assert failed["why"]["text"].startswith("failed 2 times")


def test_a_model_removed_while_it_waits_for_its_restart_is_gone(vllmd: Vllmd) -> None:
    """Backoff is no reason to stay; its memory is free."""
    vllmd.model("a", {"crash_at": "load"}, restart={"backoff": "1h", "backoff_max": "1h"}).model("b").start()
    vllmd.act("start", "a")
    vllmd.wait("a", "backoff")
    del vllmd.models["a"]
    assert vllmd.reload()[0] == 200
    assert [model["name"] for model in vllmd.status()["models"]] == ["b"]
    assert vllmd.device()["reserved"] == 0


def test_a_second_daemon_on_the_same_state_is_refused_naming_the_first(vllmd: Vllmd) -> None:
    """Exit 1 with the holder's pid; the first and its models are untouched, its socket too."""
    vllmd.model("a").start()
    (a,) = vllmd.up("a")
    assert vllmd.process is not None
    second = subprocess.run(
        [sys.executable, "-m", "vllmd", "--config", vllmd.config], env=vllmd.environment, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert f"(pid {vllmd.process.pid})" in second.stderr and str(vllmd.state_dir) in second.stderr
    now = vllmd.look("a")
    assert (now["pids"], now["state"]) == (a["pids"], "ready")


def test_a_second_daemon_on_the_same_socket_is_refused(vllmd: Vllmd) -> None:
    """Other directories, the same socket: the one that answers there keeps it."""
    vllmd.model("a").start()
    other = vllmd.config.read_text().replace(str(vllmd.state_dir), str(vllmd.folder / "other"))
    other = other.replace(f'runtime_dir = "{vllmd.runtime}"', f'runtime_dir = "{vllmd.folder / "run"}"')
    file = vllmd.folder / "other.toml"
    file.write_text(other)
    second = subprocess.run(
        [sys.executable, "-m", "vllmd", "--config", file], env=vllmd.environment, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert f"cannot listen on {vllmd.socket}: a running vllmd answers there" in second.stderr
    vllmd.up("a")


def test_a_pid_that_is_named_in_nothing_is_not_touched(vllmd: Vllmd, neighbour: "subprocess.Popen[bytes]") -> None:
    """A cookie of another state directory is another daemon's."""
    vllmd.model("a").start()
    vllmd.up("a")
    assert vllmd.stop() == 0
    found = read(neighbour.pid)
    assert found is not None and not found.cookie.startswith(vllmd.mark)
    assert neighbour.poll() is None


def test_changes_are_logged_with_who_asked(vllmd: Vllmd) -> None:
    """uid and pid of the peer of the socket."""
    vllmd.model("a").start()
    vllmd.up("a")
    line = vllmd.hear(lambda line: line["event"] == "start asked for")
    assert (line["models"], line["uid"], line["pid"]) == (["a"], os.getuid(), os.getpid())
