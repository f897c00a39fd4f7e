"""Who is measured: the stub asked directly, vllm-router before a stub, and a whole vllmd before a stub of its own. Or, for
who works on the gateway, it alone: gate_alone.py before a stub."""

import hashlib
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import router
from tests.bench.bench_start import free_port
from tests.bench.native import Address, fetch, program, stub
from tests.bench.stage import await_ready, scratch
from tests.bench.usage import moment
from tests.e2e.daemon import ROOT, Daemon
from tests.fake.environment import install
from tests.fake.make_model import make_model

DIRECT, ROUTER, VLLMD, ALONE = "direct", "vllm-router", "vllmd", "alone"
KEY = "sk-bench"
LIMIT = 60.0  # seconds
CONFIG = f"""[http]
listen = ["127.0.0.1:{{port}}"]
[keys.bench]
hash = "sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"
[models.bench]
model = "{{{{models}}}}/bench"
autostart = true
"""
ENGINE = """#!{python}
import os
import sys

words = sys.argv[1:]
stub = ["stub", "--name", words[words.index("--served-model-name") + 1]]
for flag in ("--uds", "--port"):
    if flag in words:
        stub += [flag, words[words.index(flag) + 1]]
os.execv({stub!r}, stub)
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """One who answers at `port`. `pid` is its process, None for the stub alone; `stub` is where the stub behind it can be
    asked; `started` seconds went from its exec to its first answer; `idle` bytes it had then."""

    name: str
    port: int
    stub: Address
    pid: int | None = None
    key: str = ""
    started: float = 0.0
    idle: int = 0


@contextmanager
def peers(names: Sequence[str]) -> Iterator[list[Peer]]:
    """All of these, started one after another, idle."""
    with ExitStack() as stack:
        folder, engine = stack.enter_context(scratch()), stack.enter_context(stub())
        yield [stack.enter_context(KINDS[name](folder, engine)) for name in names]


@contextmanager
def direct(_: Path, engine: int) -> Iterator[Peer]:
    """The stub itself."""
    yield Peer(DIRECT, engine, engine)


@contextmanager
def through_router(folder: Path, engine: int) -> Iterator[Peer]:
    """vllm-router, when it serves."""
    command = router.command()
    began = time.monotonic()
    with router.router(command, engine, folder / "router.log") as (port, pid):
        started = await_answer(port, "") - began
        yield Peer(ROUTER, port, engine, pid, started=started, idle=moment().rss(pid))


@contextmanager
def through_vllmd(folder: Path, _: int) -> Iterator[Peer]:
    """vllmd with keys, metrics and logging, when its model serves: on a stub that it has started itself."""
    home, port = folder / "engine", free_port()
    environment(home)
    daemon = Daemon(folder, home, folder / "cache", limit="16GiB", defaults='vram = "1500MiB"')
    daemon.configure(CONFIG.format(port=port))
    config = folder / "vllmd.toml"
    config.write_text(config.read_text().replace("[http]\nlisten = []\n", "", 1))
    try:
        began = time.monotonic()
        daemon.start()
        started = await_answer(port, KEY) - began
        await_ready(daemon, ["bench"])
        status = daemon.client.get("/api/v1/status")
        pid, endpoint = int(status["daemon"]["pid"]), Path(status["models"][0]["endpoint"].removeprefix("unix:"))
        yield Peer(VLLMD, port, endpoint, pid, KEY, started, moment().rss(pid, program("stub")))
    finally:
        daemon.stop()
    daemon.check_nothing_left()


@contextmanager
def through_gate(folder: Path, engine: int) -> Iterator[Peer]:
    """The gateway without the daemon."""
    command = [sys.executable, "-m", "tests.bench.gate_alone", "--upstream", f"127.0.0.1:{engine}", "--port", "0"]
    began = time.monotonic()
    with (folder / "alone.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, text=True)
    with process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().split()[1])
            started = await_answer(port, KEY) - began
            yield Peer(ALONE, port, engine, process.pid, KEY, started, moment().rss(process.pid))
        finally:
            process.terminate()


def environment(folder: Path) -> None:
    """An environment whose `vllm serve` becomes the stub."""
    command = install(folder)
    command.write_text(ENGINE.format(python=folder / "bin/python", stub=str(program("stub"))))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    make_model(folder / "models/bench")


def await_answer(port: int, key: str) -> float:
    """When the list of models came."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        try:
            status, _ = fetch(port, "/v1/models", key)
            if status == 200:
                return time.monotonic()
        except (OSError, ValueError):
            pass  # it does not listen yet
        time.sleep(0.002)
    raise AssertionError(f"no answer on port {port} within {LIMIT:.0f} s")


def memory(peer: Peer) -> int:
    """Bytes that it has now, without its stub."""
    return 0 if peer.pid is None else moment().rss(peer.pid, program("stub"))


KINDS: dict[str, Callable[[Path, int], AbstractContextManager[Peer]]] = {
    DIRECT: direct, ROUTER: through_router, VLLMD: through_vllmd, ALONE: through_gate,
}  # fmt: skip
