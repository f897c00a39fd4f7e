"""Real vLLM out of a warm spare: what can be seen of it is what can be seen of a plain start, and it serves sooner."""

import asyncio
import http.client
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.bench.bench_start import await_answer, free_port
from tests.e2e.conftest import Report
from tests.e2e.processes import find
from vllmd.edge.kill import end_marked, kill_tree
from vllmd.edge.process import Child, spawn
from vllmd.edge.spare import IMPORTING, Spares
from vllmd.facts import Launch

PARKED_WITHIN = 120.0  # seconds

#: What differs between any two starts.
CHANCE = [
    (r"\d\d-\d\d \d\d:\d\d:\d\d", "TIME"), (r"W\d{4} \d\d:\d\d:\d\d\.\d+", "TIME"), (r"\[W\d+ [\d:.]+ ", "[TIME "),
    (r"\b\d+\.\d+(it/s| ?s\b| seconds| GiB|/)", r"N\1"), (r"<?\d\d:\d\d,", "T,"), (r"127\.0\.0\.1:\d+", "ADDRESS"),
    (r"pid=\d+", "pid"), (r"process \[\d+\]", "process"), (r"\b\d{3,}\b", "N"), (r"Methods: .*", "Methods"),
    (r"vllm_dist_\w+|ipc://\S+|psm_\w+", "NAME"),
]  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A started vLLM as others see it, and how long its start took."""

    seconds: float
    cmdline: list[str]
    environ: dict[str, str]
    tree: list[tuple[str, str]]
    log: list[str]
    models: dict[str, Any]


class Bench:
    """Launches of one model, started either way."""

    def __init__(self, engine: Path, cache: Path, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.mark = f"test-{uuid4().hex}"
        self.root = Path("/tmp") / f"vs-{uuid4().hex[:8]}"  # short: vLLM makes sockets below it
        self.root.mkdir()
        self.spares = Spares(self.root, self.mark)
        self.env = {
            "VLLM_CACHE_ROOT": str(cache / "vllm"), "VLLM_CONFIG_ROOT": str(cache / "config"),
            "TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0", "NO_COLOR": "1",
            "VLLM_DISABLE_LOG_LOGO": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.command = str(engine / "bin/vllm")
        self.number = 0

    def launch(self, **env: str) -> Launch:
        self.number += 1
        scratch = self.root / f"alpha-{self.number}"
        scratch.mkdir()
        own = {"TMPDIR": str(scratch), "VLLM_RPC_BASE_PATH": str(scratch)}
        port = free_port()
        argv = (
            self.command, "serve", str(self.engine / "models/alpha"), "--served-model-name", "alpha",
            "--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "512",
            "--enforce-eager", "--shutdown-timeout", "5",
        )  # fmt: skip
        cookie = f"{self.mark}:alpha:{self.number}"
        return Launch(argv, self.env | own | env, f"http://127.0.0.1:{port}", "alpha", str(scratch), cookie)

    def take(self, launch: Launch, log: Path = Path(os.devnull)) -> Child | str:
        with log.open("ab") as file:
            return self.spares.take(launch, log_fd=file.fileno(), cwd=Path(launch.scratch))

    async def park(self) -> float:
        """Returns how long it took."""
        began = time.monotonic()
        assert self.spares.prepare(self.command, self.env) == ""
        parked = self.spares._parked[self.command]
        while parked.look() == IMPORTING:
            assert time.monotonic() < began + PARKED_WITHIN
            await asyncio.sleep(0.05)
        assert parked.look() == ""
        return time.monotonic() - began

    async def serve(self, *, warm: bool) -> Seen:
        """A start until it has answered; then it is ended."""
        launch = self.launch()
        port, log = int(launch.endpoint.rpartition(":")[2]), self.folder / f"{self.number}.log"
        began = time.monotonic()
        if warm:
            child = self.take(launch, log)
            assert isinstance(child, Child), child
        else:
            with log.open("ab") as file:
                child = spawn(launch, log_fd=file.fileno(), cwd=Path(launch.scratch))
        try:
            seconds = await asyncio.to_thread(await_answer, port) - began
            own = {launch.scratch: "SCRATCH", launch.cookie: "COOKIE", str(port): "PORT", str(child.pid): "PID"}
            return Seen(
                seconds, list(shown(child.pid, "cmdline", own)),
                dict(pair.split("=", 1) for pair in shown(child.pid, "environ", own)),
                [(process.name, replaced(process.cookie, own)) for process in find(launch.cookie)],
                sorted(stripped(line, own) for line in log.read_text(errors="replace").splitlines()), ask(port),
            )  # fmt: skip
        finally:
            assert await kill_tree(child) == ()
            child.close()
            assert find(launch.cookie) == []


def shown(pid: int, name: str, own: dict[str, str]) -> list[str]:
    data = Path(f"/proc/{pid}/{name}").read_bytes()
    assert data.endswith(b"\0") and b"\0\0" not in data
    return [replaced(word, own) for word in data.decode().rstrip("\0").split("\0")]


def replaced(text: str, own: dict[str, str]) -> str:
    for value, name in own.items():
        text = text.replace(value, name)
    return text


def stripped(line: str, own: dict[str, str]) -> str:
    line = replaced(line, own)
    for pattern, name in CHANCE:
        line = re.sub(pattern, name, line)
    return line


def ask(port: int) -> dict[str, Any]:
    """What it says that it serves."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/v1/models")
    (found,) = json.loads(connection.getresponse().read())["data"]
    connection.close()
    return {name: found[name] for name in ("id", "root", "max_model_len")}


@pytest.fixture
async def bench(engine: Path, cache: Path, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(engine, cache, tmp_path)
    yield made
    await made.spares.drop()
    left = find(made.mark)
    await end_marked(made.mark)
    shutil.rmtree(made.root)
    assert left == []


async def test_it_is_a_plain_vllm_that_serves_sooner(bench: Bench, report: Report) -> None:
    """Command line, environment, names, tree with its cookies, log and answers are the same. The target is a median of five
    pairs (`make bench`); one pair on a busy machine shows that it is sooner."""
    await bench.serve(warm=False)  # caches
    seconds = await bench.park()
    report("parked: import of vLLM in the background", seconds)
    report("... memory of its own, parked", f"{bench.spares.rss() / 2**20:.0f} MiB")
    warm = await bench.serve(warm=True)
    bare = await bench.serve(warm=False)
    report("start to first answer, bare", bare.seconds)
    report("... from the warm spare", warm.seconds)
    report("... ratio, one pair", f"{warm.seconds / bare.seconds:.2f} x")
    assert replace(warm, seconds=0.0) == replace(bare, seconds=0.0)
    assert [name for name, _ in warm.tree] == ["vllm", "python", "VLLM::EngineCor", "VLLM::Worker"]
    assert warm.seconds < bare.seconds


async def test_what_real_vllm_reads_at_import_is_known(bench: Bench) -> None:
    """Seen while it imported, or kept from compiled code: each of these needs a plain start. What it reads late does not."""
    await bench.park()
    for name, why in {
        "OMP_NUM_THREADS": "differs in OMP_NUM_THREADS", "HF_HUB_OFFLINE": "HF_HUB_OFFLINE, which is read at import",
        "HF_HOME": "HF_HOME, which is read at import", "VLLM_LOGGING_LEVEL": "VLLM_LOGGING_LEVEL, which is read at import",
        "VLLM_TARGET_DEVICE": "read at import", "VLLM_PLUGINS": "read at import",
        "LD_LIBRARY_PATH": "read at import", "LD_PRELOAD": "differs in LD_PRELOAD", "TORCH_LOGS": "read at import",
        "MKL_NUM_THREADS": "differs in MKL_NUM_THREADS", "PYTHONHASHSEED": "differs in PYTHONHASHSEED",
    }.items():  # fmt: skip
        assert why in str(bench.take(bench.launch(**{name: "0"}))), name
    late = bench.launch(
        CUDA_VISIBLE_DEVICES="GPU-0", CUDA_DEVICE_ORDER="PCI_BUS_ID", HF_TOKEN="t", VLLM_CPU_KVCACHE_SPACE="1"
    )
    child = bench.take(late)
    assert isinstance(child, Child), child
    assert await kill_tree(child) == ()
    child.close()
