"""The daemon as a process: its start with many models, and what it costs while nothing happens."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.figures import Figure, middle
from tests.bench.stage import await_ready, fake_daemon, prepared, tables
from tests.e2e.daemon import Daemon
from vllmd.ctl.faults import Unreachable

LIMIT = 30.0  # seconds
TICKS = os.sysconf("SC_CLK_TCK")
IMPORTS = "import asyncio, aiohttp.web, structlog, psutil, prometheus_client, tomli"


def start(rounds: int) -> list[Figure]:
    """From exec until it answers that it is ready; beside a Python that only imports."""
    took: dict[str, list[float]] = {"start": [], "imports": []}
    with prepared(tables(0, 100)) as daemon:
        for round_ in range(rounds + 1):
            seconds = once([sys.executable, "-c", IMPORTS]), boot(daemon)
            daemon.stop()
            if round_:  # the first compiles modules and fills the page cache
                took["imports"].append(seconds[0])
                took["start"].append(seconds[1])
    return [
        middle("daemon: start to ready, 100 models configured", took["start"], "s", 1.0),
        middle("... python -c 'import aiohttp.web, ...' beside it", took["imports"], "s"),
    ]


def boot(daemon: Daemon) -> float:
    """Seconds from exec until it says that it is ready, asked over its socket."""
    began = time.perf_counter()
    daemon.start()
    while time.perf_counter() < began + LIMIT:
        try:
            if daemon.client.fetch("GET", "/readyz")[0].status == 200:
                return time.perf_counter() - began
        except Unreachable:
            time.sleep(0.002)  # it does not listen yet
    raise AssertionError(f"vllmd is not ready after {LIMIT:.0f} s")


def once(command: list[str]) -> float:
    """Seconds of one run, from exec to exit."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def idle(seconds: float) -> list[Figure]:
    """Eight ready engines and nobody who asks: CPU and memory of the daemon."""
    with fake_daemon(tables(8, 8)) as daemon:
        names = [f"m{n:03}" for n in range(8)]
        await_ready(daemon, names)
        pid = int(daemon.client.get("/api/v1/status")["daemon"]["pid"])
        time.sleep(5)  # the last start's echo: devices are read once more, what was learned is saved
        used, began = cpu(pid), time.monotonic()
        time.sleep(seconds)
        share = (cpu(pid) - used) / (time.monotonic() - began) * 100
        status = Path(f"/proc/{pid}/status").read_text()
        rss, peak = (int(status.partition(f"{key}:")[2].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
        return [
            Figure("daemon: CPU with 8 ready models", share, "%", 1.0, f"of a core, over {seconds:.0f} s"),
            Figure("daemon: RSS with 8 ready models", rss, "MiB", 80.0, f"peak {peak:.0f} MiB"),
        ]


def cpu(pid: int) -> float:
    """Seconds of CPU that the process and all its threads have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
