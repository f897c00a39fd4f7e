"""The machine under the daemon: a driver that fails, a clock that jumps. It says so and goes on; models do not notice."""

import ast
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.daemon import Until, Vllmd, fake_vllm, vllmd, weights
from tests.e2e.chat import answers
from tests.fake.environment import ROOT

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures

# pynvml with two cards of 24 GiB, in the state that a file says: {"broken": an NVML error code or 0, "cards": how many}.
NVML = """
import json
from pathlib import Path
from types import SimpleNamespace

FILE = Path(__file__).with_name("nvml.json")
NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_GPU_IS_LOST, NVML_ERROR_LIB_RM_VERSION_MISMATCH = 3, 15, 18

class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(f"NVML error {value}")
        self.value = value

def check():
    state = json.loads(FILE.read_text())
    if state["broken"]:
        raise NVMLError(state["broken"])
    return state

def unsupported(*_):
    raise NVMLError(NVML_ERROR_NOT_SUPPORTED)

nvmlInit = nvmlShutdown = check
nvmlDeviceGetCount = lambda: check()["cards"]
nvmlDeviceGetHandleByIndex = lambda index: check() and index
nvmlDeviceGetMigMode = nvmlDeviceGetDisplayActive = unsupported
nvmlDeviceGetMemoryInfo = lambda card: check() and SimpleNamespace(total=24 << 30, used=1 << 28, free=(24 << 30) - (1 << 28))
nvmlDeviceGetUUID = lambda card: f"GPU-{card}"
nvmlDeviceGetName = lambda card: "NVIDIA L4"
nvmlDeviceGetComputeRunningProcesses = nvmlDeviceGetGraphicsRunningProcesses = lambda card: []
"""


class Driver:
    """NVIDIA's, as the daemon sees it."""

    def __init__(self, daemon: Vllmd) -> None:
        self._file = daemon.folder / "nvml.json"
        (daemon.folder / "fake_nvml.py").write_text(NVML)
        daemon.environment |= {"VLLMD_NVML": "fake_nvml", "PYTHONPATH": str(daemon.folder)}
        daemon.devices = {"limit": "20GiB"}
        daemon.defaults |= {"vram": "6GiB", "args": {}, "env": {"FAKE_START_S": "0.1", "FAKE_DEVICE": "cuda"}}
        self.set()

    def set(self, broken: int = 0, cards: int = 2) -> None:
        draft = self._file.with_suffix(".new")
        draft.write_text(json.dumps({"broken": broken, "cards": cards}))
        draft.rename(self._file)


def trouble(daemon: Vllmd) -> str:
    return str(daemon.status()["daemon"]["trouble"])


def test_a_driver_that_vanishes_is_told_and_survived(vllmd: Vllmd) -> None:
    """An update under the running kernel module: what to do is said, the model serves on, and it is over when it is over."""
    driver = Driver(vllmd)
    vllmd.model("a", gpus=[0]).model("b", gpus=[1]).start()
    (a,) = vllmd.up("a")
    assert a["devices"] == ["GPU-0"] and a["reserved"] == 6 << 30
    driver.set(broken=18)
    told = vllmd.hear(lambda line: "the driver was updated: reboot" in line["event"])
    assert told["level"] == "error"
    assert "driver was updated" in trouble(vllmd)
    now = vllmd.look("a")
    assert (now["pids"], now["state"], now["attempt"]) == (a["pids"], "ready", 1)
    assert answers(now)
    vllmd.wait("a", lambda _: vllmd.device()["silent_s"] > 0)
    driver.set()
    vllmd.wait("a", lambda _: trouble(vllmd) == "")
    vllmd.up("b")


def test_the_end_does_not_wait_for_a_dead_driver(vllmd: Vllmd) -> None:
    """Whether the memory is back nobody can say, and nobody needs it any more."""
    driver = Driver(vllmd)
    vllmd.model("a").model("b").start()
    vllmd.up("a", "b")
    driver.set(broken=18)
    vllmd.hear(lambda line: "the driver was updated" in line["event"])
    vllmd.act("stop", "a")
    vllmd.wait("a", lambda m: m["state"] == "stopping" and m["why"]["short"] == "memory coming back")
    began = time.monotonic()
    assert vllmd.stop() == 0
    assert time.monotonic() - began < 20


def test_a_card_that_falls_off_the_bus_is_missed_by_name(vllmd: Vllmd) -> None:
    """The model on the other card is untouched, the device says how long it has been silent."""
    driver = Driver(vllmd)
    vllmd.model("a", gpus=[0]).start()
    (a,) = vllmd.up("a")
    driver.set(cards=1)
    vllmd.hear(lambda line: "GPU 1 (NVIDIA L4) is gone" in line["event"])
    assert vllmd.look("a")["pids"] == a["pids"]
    silent = {device["id"]: device["silent_s"] for device in vllmd.status()["devices"]}
    assert silent["GPU-1"] > silent["GPU-0"]


def test_a_gpu_that_is_not_there_fails_its_model_only(vllmd: Vllmd) -> None:
    """Refused with what is seen instead; the daemon is up, and the driver of no cards makes it a CPU machine."""
    driver = Driver(vllmd)
    driver.set(cards=0)
    vllmd.model("a", gpus=["GPU-0"]).start()
    code, error = vllmd.act("start", "a")
    assert code == 422
    assert "GPU-0 is not present" in error["message"]


# The wall clock that a file says: seconds to add to the true one.
CLOCK = """
import pathlib, time
true, offset = time.time, pathlib.Path(__file__).with_name("offset")
time.time = lambda: true() + float(offset.read_text() or 0)
"""


def test_a_clock_that_jumps_moves_no_decision(vllmd: Vllmd) -> None:
    """A year ahead, then two back: nothing is called hung or stalled, backoff and uptime go on, restarts work."""
    offset = vllmd.folder / "offset"
    offset.write_text("0")
    (vllmd.folder / "sitecustomize.py").write_text(CLOCK)
    vllmd.environment["PYTHONPATH"] = str(vllmd.folder)
    vllmd.model("a").start()
    (a,) = vllmd.up("a")
    for attempt, seconds in ((2, 365 * 86400), (3, -2 * 365 * 86400)):
        offset.write_text(str(seconds))
        before = vllmd.look("a")
        assert (before["state"], before["attempt"]) == ("ready", attempt - 1)
        assert 0 <= before["uptime_s"] < 3600 and 0 <= before["since_s"] < 3600
        os.kill(before["pid"], signal.SIGKILL)
        after = vllmd.wait("a", came_up(attempt))
        assert after["failures"] == attempt - 1
    assert a["pid"] != after["pid"]


# The monotonic clock likewise: to a process that was stopped it jumps.
STOPPED = """
import pathlib, time
true, offset = time.monotonic, pathlib.Path(__file__).with_name("offset")
time.monotonic = lambda: true() + float(offset.read_text())
"""


def test_a_daemon_that_was_stopped_blames_nobody(vllmd: Vllmd) -> None:
    """Ctrl-Z for an hour, then fg: what was silent to a daemon that did not listen is neither hung nor stalled."""
    offset = vllmd.folder / "offset"
    offset.write_text("0")
    (vllmd.folder / "sitecustomize.py").write_text(STOPPED)
    vllmd.environment["PYTHONPATH"] = str(vllmd.folder)
    vllmd.model("a", hang_after="20s").model("b", start_stall="60s", env={"FAKE_START_S": "600"}).start()
    (a,) = vllmd.up("a")
    vllmd.act("start", "b")
    b = vllmd.wait("b", lambda m: m["state"] == "starting" and m["pid"])
    draft = offset.with_suffix(".new")
    draft.write_text("3600")
    draft.rename(offset)
    told = vllmd.hear(lambda line: "did not run for 60 min" in line["event"])
    assert told["level"] == "warning"
    vllmd.wait("a", lambda m: m["uptime_s"] > 3600)
    for before in (a, b):
        after = vllmd.look(before["name"])
        assert (after["pid"], after["attempt"]) == (before["pid"], before["attempt"])
    assert answers(vllmd.look("a"))


def came_up(attempt: int) -> Until:
    """Ready in this attempt."""
    return lambda m: m["state"] == "ready" and m["attempt"] == attempt


def test_no_decision_reads_the_wall_clock() -> None:
    """In the core no clock at all; in the wiring, where time is measured, only the monotonic one."""
    wiring = [ROOT / "vllmd" / name for name in ("daemon.py", "attempt.py", "lookout.py")]
    for path in [*(ROOT / "vllmd/core").glob("*.py"), *wiring]:
        read = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        clocks = {name for name in read if name.startswith(("time.", "datetime.")) and name != "time.monotonic"}
        assert clocks == set(), path
        imports = imported(path)
        assert "datetime" not in imports
        assert path in wiring or "time" not in imports, path


def imported(path: Path) -> set[str]:
    """The modules that a file imports, whole or in part."""
    nodes: list[Any] = list(ast.walk(ast.parse(path.read_text())))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return whole | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
