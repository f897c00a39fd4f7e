"""The FAKE_* environment as one value, and the clock of the start: each phase takes its share, or goes wrong in it."""

import mmap
import os
import signal
import time
from pathlib import Path
from typing import Final, NamedTuple

# Share of FAKE_START_S by phase, in order. Who lives it: the API server import, config and http; the engine core
# engine; a worker the rest.
SHARES: Final = {
    "import": 0.30, "config": 0.10, "engine": 0.05, "worker": 0.05, "download": 0.0, "load": 0.20,
    "profile": 0.10, "compile": 0.10, "graphs": 0.05, "http": 0.05,
}  # fmt: skip


class Faults(NamedTuple):
    """What was asked for; see the table in fakevllm.py. Times in seconds, sizes in bytes."""

    start_s: float = 0.3
    fail: str = ""
    exit_after: str = ""
    crash_at: str = ""
    stall_at: str = ""
    ignore_term: bool = False
    escape: bool = False
    leak_process: bool = False
    health_lie: bool = False
    hostile_log: bool = False
    lines: int = 0
    memory: int = 0
    eat: str = ""
    workers: int = 0
    shards: int = 0
    download: int = 0
    death_s: float = 0.5
    tokens_per_s: float = 0.0
    prefill_s: float = 0.0
    answer: str = ""
    kv_per_token: int = 0
    total: int = 0
    device: str = "cpu"
    metrics_bytes: int = 0
    sleep: str = ""

    @classmethod
    def read(cls, env: dict[str, str]) -> "Faults":
        """The faults that `env` asks for; none when the file of FAKE_ONCE exists, which the first start makes."""
        asked: dict[str, object] = {}
        once = env.get("FAKE_ONCE")
        spent = once is not None and Path(once).exists()
        if once is not None:
            Path(once).touch()
        for name, default in cls._field_defaults.items():
            word = env.get("FAKE_" + name.upper(), "")
            if word and not (spent and name in ONCE):
                asked[name] = word not in ("0", "no") if isinstance(default, bool) else type(default)(word)
        return cls()._replace(**asked)  # type: ignore[arg-type]


ONCE: Final = {"fail", "exit_after", "crash_at", "stall_at"}


def live(phase: str, faults: Faults) -> None:
    """Spend the phase's share of the start; stall or die in it when asked to."""
    if phase == faults.stall_at:
        while True:
            signal.pause()
    time.sleep(SHARES[phase] * faults.start_s)
    if phase == faults.crash_at:
        os.kill(os.getpid(), signal.SIGKILL)


def hold(size: int) -> mmap.mmap | None:
    """Memory of `size` bytes, every page of it touched, so that it counts as resident; None for none."""
    if not size:
        return None
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, 1 << 20):
        held[start : start + (1 << 20)] = b"\1" * min(1 << 20, size - start)
    return held


def eat_when_asked(path: str) -> None:
    """Take memory without end, 16 MiB at a time, once the file is there; to be run in a thread."""
    while not Path(path).exists():
        time.sleep(0.05)
    eaten = []
    while True:
        eaten.append(hold(16 << 20))
        time.sleep(0.01)


def spawn_escapee() -> None:
    """A grandchild in a session of its own that holds 16 MiB and outlives everyone (by two minutes at most)."""
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        rename("fake-escapee", "fake-escapee")
        linger(16 << 20)
    os.waitpid(child, 0)


def spawn_leftover() -> None:
    """A child that stays in the process group, deaf to SIGTERM, when all the others are gone."""
    if os.fork() == 0:
        rename("fake-leftover", "fake-leftover")
        linger(0)


def linger(size: int) -> None:
    """Hold memory and do nothing; the alarm is there for the test that forgets to clean up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(120)
    held = hold(size)
    os.closerange(3, 256)
    while held or not size:
        signal.pause()


def rename(comm: str, title: str) -> None:
    """Name this process as vLLM would: comm (15 bytes) and, as setproctitle does, its command line."""
    Path("/proc/self/comm").write_bytes(comm.encode()[:15])
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end of proc(5), counted from field 3
    room = end - start
    try:
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(title.encode()[: room - 1].ljust(room, b"\0"))
    except OSError:  # some kernels forbid it: the name in comm is what counts
        return
