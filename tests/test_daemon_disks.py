"""Disks that are full, hang or hold rubbish: the daemon is up and says so, running models do not notice."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.daemon import Until, Vllmd, fake_vllm, vllmd, weights
from tests.e2e.chat import answers

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures

NO_ROW = b'{"x": {"base": "y"}}'  # a table as it should be, but what is in it is none
UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
MOUNT = 'mount -t tmpfs -o size="$1" none "$2"; mount -t tmpfs -o size="$1" none "$3";'
FILL = 'head -c 1G /dev/zero > "$2/fill" 2>/dev/null; head -c 1G /dev/zero > "$3/fill" 2>/dev/null;'


def mount_small(daemon: Vllmd, size: str, before: str = "") -> None:
    """State and logs on file systems of their own, seen by the daemon alone; `before` is run there first."""
    try:
        probe = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", daemon.folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if probe.returncode:
        pytest.skip(f"no mount namespace: {probe.stderr.decode().strip()}")
    daemon.state_dir.mkdir()
    daemon.log_dir.mkdir()
    words: list[str | Path] = [size, daemon.state_dir, daemon.log_dir]
    daemon.command = [*UNSHARE, "sh", "-c", f'{MOUNT} {before} shift 3; exec "$@"', "sh", *words, *daemon.command]


def inside(daemon: Vllmd, path: Path) -> Path:
    """The path as the daemon sees it."""
    assert daemon.process is not None
    return Path(f"/proc/{daemon.process.pid}/root{path}")


def fill(folder: Path) -> None:
    """Until not a byte is left."""
    with (folder / "fill").open("wb", buffering=0) as file:
        try:
            for size in (1 << 20, 1):
                while file.write(b"x" * size):
                    pass
        except OSError:
            return


def test_disks_that_fill_up_cost_neither_models_nor_the_daemon(vllmd: Vllmd) -> None:
    """State and logs full: said once with the path, the running model is the same and answers, a new one is refused."""
    mount_small(vllmd, "80m")
    vllmd.model("a").model("b").start()
    (a,) = vllmd.up("a")
    for folder in (vllmd.state_dir, vllmd.log_dir):
        fill(inside(vllmd, folder))
    code, error = vllmd.act("start", "b")
    assert code == 422
    assert " bytes left" in error["message"] and error["remedies"][0].startswith("free space on the file system of")
    assert vllmd.look("b")["why"]["class"] == "no-disk"
    now = vllmd.look("a")
    assert (now["state"], now["pids"], now["attempt"]) == ("ready", a["pids"], 1)
    assert answers(now)
    for folder in (vllmd.state_dir, vllmd.log_dir):
        (inside(vllmd, folder) / "fill").unlink()
    vllmd.up("b")


def test_what_cannot_be_written_is_told(vllmd: Vllmd) -> None:
    """The disk fills up while a model starts: it comes up, and the sentence names the file."""
    mount_small(vllmd, "80m")
    vllmd.model("a", {"start_s": 1.5}).start()
    vllmd.act("start", "a")
    vllmd.wait("a", lambda m: m["phase"] == "load")
    for folder in (vllmd.state_dir, vllmd.log_dir):
        fill(inside(vllmd, folder))
    a = vllmd.wait("a", "ready")
    told = vllmd.hear(lambda line: line["event"].endswith("No space left on device; it stays as it was"))
    assert str(vllmd.state_dir) in told["event"]
    assert answers(a)
    assert vllmd.look("a")["state"] == "ready"


def test_a_daemon_starts_on_full_disks(vllmd: Vllmd) -> None:
    """It is up, and a model's start is refused with the reason."""
    mount_small(vllmd, "64k", FILL)
    vllmd.model("a").start()
    code, error = vllmd.act("start", "a")
    assert (code, error["code"]) == (422, "no-disk")
    assert str(vllmd.log_dir) in error["message"]


def test_a_disk_that_hangs_does_not_hold_up_the_end(vllmd: Vllmd) -> None:
    """fsync never returns: the daemon serves, stops its models, and ends within its time."""
    (vllmd.folder / "sitecustomize.py").write_text("import os, time\nos.fsync = lambda fd: time.sleep(3600)\n")
    vllmd.environment["PYTHONPATH"] = str(vllmd.folder)
    vllmd.model("a").start()
    vllmd.up("a")
    vllmd.act("stop", "a")
    vllmd.wait("a", "stopped")
    began = time.monotonic()
    assert vllmd.stop() == 0
    assert time.monotonic() - began < 15


def told(name: str) -> Until:
    """Its file is damaged and was set aside."""
    return lambda line: f"{name}.json" in line["event"] and "set aside" in line["event"]


@pytest.mark.parametrize("rubbish", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", NO_ROW, b"[" * 100_000])
def test_damaged_state_is_set_aside_and_named(vllmd: Vllmd, rubbish: bytes) -> None:
    """needs.json and good.json of any kind: the daemon starts without them, and writes them anew."""
    vllmd.state_dir.mkdir()
    for name in ("needs", "good"):
        (vllmd.state_dir / f"{name}.json").write_bytes(rubbish)
    vllmd.model("a", {"memory": 64 << 20}).start()
    vllmd.up("a")
    if rubbish != NO_ROW:
        for name in ("needs", "good"):
            vllmd.hear(told(name))
            assert (vllmd.state_dir / f"{name}.damaged").read_bytes() == rubbish
    needs = vllmd.state_dir / "needs.json"
    vllmd.wait("a", lambda _: needs.exists() and needs.read_bytes() not in (rubbish, b"{}"))  # measured, and kept
    assert vllmd.stop() == 0
    (need,) = json.loads(needs.read_bytes()).values()
    assert need["base"] > 16 << 20 and need["kv"] > 16 << 20
    assert "a" in json.loads((vllmd.state_dir / "good.json").read_bytes())


def test_state_of_an_older_or_newer_vllmd_is_no_obstacle(vllmd: Vllmd) -> None:
    """Keys that it does not know, keys that are missing."""
    vllmd.state_dir.mkdir()
    good = {"base": 5, "kv": 1, "phases": {}, "total": 1}
    rows = {"newer": good | {"more": True}, "older": {"base": 5}, "endless": good | {"base": 1e999}, "no row": [5]}
    (vllmd.state_dir / "needs.json").write_text(json.dumps(rows))
    vllmd.model("a").start()
    vllmd.up("a")


def test_a_log_directory_that_cannot_be_written_refuses_starts(vllmd: Vllmd) -> None:
    """A file where the directory should be: the daemon is up and names it."""
    vllmd.log_dir.write_text("not a directory")
    vllmd.model("a").start()
    code, error = vllmd.act("start", "a")
    assert code == 422
    assert str(vllmd.log_dir) in error["message"]


def test_an_unwritable_state_directory_ends_the_daemon_with_the_reason(vllmd: Vllmd) -> None:
    """Without it nothing can be kept, and two daemons could not be told apart."""
    vllmd.state_dir.write_text("not a directory")
    vllmd.write()
    vllmd.spawn()
    assert vllmd.ended() == 1
    assert str(vllmd.state_dir) in vllmd.said
    assert "Traceback" not in vllmd.said
