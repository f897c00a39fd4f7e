"""A worker: holds the memory, lives the phases from the join to the graphs, then answers each step of its engine."""

import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.fake.faults import Faults, eat_when_asked, hold, live, rename
from tests.fake.flags import Options
from tests.fake.model import Model
from tests.fake.texts import FAILURES, StartError, bare, log, log_worker_failure, write
from tests.fake.wire import Line

GIB: Final = 1 << 30


class Start(NamedTuple):
    """All that the engine and its workers need to know."""

    options: Options
    faults: Faults
    model: Model


def run_worker(engine: Line, rank: int, start: Start) -> None:
    """Do the engine's steps until it is gone, as vLLM's workers do by their death pipe."""
    who = worker_name(rank, start.options.workers)
    rename("VLLM::" + who, "VLLM::" + who)
    if start.faults.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    held = None
    threading.Thread(target=follow, args=(engine,), daemon=True).start()
    if start.faults.eat:
        threading.Thread(target=eat_when_asked, args=(start.faults.eat,), daemon=True).start()
    while messages := engine.hear():
        for message in messages:
            try:
                match message["do"]:
                    case "load":
                        held = load(who, rank, start)
                    case "profile":
                        message["kv"] = profile(who, start)
                    case "graphs":
                        capture_graphs(who, start)
                    case "sleep" if held is not None and start.faults.sleep != "leaky":
                        held.close()
                        held = None
                    case "wake" if held is None:
                        held = hold(start.faults.memory)
            except StartError as error:
                log_worker_failure(who, str(error), loading=message["do"] == "load")
                if message["do"] == "load":
                    os._exit(1)
                message["error"] = str(error).partition(": ")[2]  # a later step reports, and lives on
            engine.say(**message)
    os._exit(0)


def follow(engine: Line) -> None:
    """End with the engine, wherever the main thread is: vLLM's death pipe."""
    poll = select.poll()
    poll.register(engine.sock, select.POLLRDHUP)
    poll.poll()
    log("Worker", "multiproc_executor.py:843", "Parent process exited, terminating worker queues")
    os._exit(0)


def worker_name(rank: int, count: int) -> str:
    """As vLLM calls it: numbered only where there are several."""
    return "Worker" if count == 1 else f"Worker_TP{rank}"


def fail(phase: str, start: Start) -> None:
    """StartError when FAKE_FAIL asks for one of this phase."""
    failure = FAILURES.get(start.faults.fail)
    if failure and failure.phase == phase:
        raise StartError(failure.cause.format(utilization=start.options.utilization, model=start.options.model))


def load(who: str, rank: int, start: Start) -> Any:
    """Join the group, check the memory, read the weights; what FAKE_MEMORY has it hold."""
    options, faults, model = start
    live("worker", faults)
    cpu = faults.device == "cpu"
    log(
        who,
        "parallel_state.py:1906",
        f"world_size={options.workers} rank={rank} local_rank={rank} "
        f"distributed_init_method=tcp://127.0.0.1:45678 backend={'gloo' if cpu else 'nccl'}",
    )
    fail("worker", start)
    check_memory(start)
    download(faults)
    where = "cpu_model_runner.py:68" if cpu else "gpu_model_runner.py:5107"
    log(who, where, f"Starting to load model {options.model}...")
    log(who, "base_loader.py:82", "Initializing model took 0.227928 seconds")
    log(
        who,
        "weight_utils.py:1108",
        f"Filesystem type for checkpoints: EXT4. Checkpoint size: {gib(model.weights)} GiB. "
        f"Available RAM: {gib(memory(faults)[1])} GiB.",
    )
    began = time.monotonic()
    shards = faults.shards or model.shards
    progress("Loading safetensors checkpoint shards", 0, shards)
    for done in range(1, shards + 1):
        live("load", faults._replace(start_s=faults.start_s / shards))
        fail("load", start)
        progress("Loading safetensors checkpoint shards", done, shards)
    held = hold(faults.memory)
    took = time.monotonic() - began
    write(2, "\n")
    log(who, "default_loader.py:501", f"Loading weights took {took:.2f} seconds")
    if not cpu:
        took_memory = f"Model loading took {gib(model.weights)} GiB memory"
        log(who, "gpu_model_runner.py:5150", f"{took_memory} and {took:.6f} seconds")
    return held


def check_memory(start: Start) -> None:
    """StartError when the share asked for is not free; the default share is not checked, lest a busy machine fail."""
    options, faults, _ = start
    total, free = memory(faults)
    wanted = int(total * options.utilization)
    if "gpu_memory_utilization" in options.given and options.kv_bytes is None and wanted > free:
        raise StartError(
            f"ValueError: Available memory on node 0 ({gib(free)}/{gib(total)} GiB) on startup is less than desired "
            f"CPU memory utilization ({options.utilization}, {gib(wanted)} GiB). On the CPU backend, the "
            "`--gpu-memory-utilization` flag controls the fraction of CPU memory reserved (despite its name). To "
            "resolve: decrease `--gpu-memory-utilization` (e.g. `--gpu-memory-utilization 0.5`) or reduce CPU memory "
            "used by other processes."
        )


def download(faults: Faults) -> None:
    """FAKE_DOWNLOAD files from the hub: a bar that goes back to the start of its line, unlike that of the shards."""
    for done in range(faults.download + 1 if faults.download else 0):
        share = 100 * done // faults.download
        write(2, f"\rFetching {faults.download} files: {share:3d}%|{'█' * (share // 10):10}| {done}/{faults.download}")
        live("download", faults)
    if faults.download:
        write(2, "\n")


def profile(who: str, start: Start) -> int:
    """Compile and measure; the bytes that are left for KV."""
    options, faults, _ = start
    live("profile", faults)
    fail("profile", start)
    if not options.eager:
        log(who, "cpu_model_runner.py:87", "Warming up model for the compilation...")
        live("compile", faults)
        log(who, "monitor.py:91", "[backbone] Initial profiling/warmup run took 0.02 s")
        log(who, "cpu_model_runner.py:91", "Warming up done.")
    total, free = memory(faults)
    kv, used = options.kv_bytes, resident()
    if kv is not None and kv > free:
        raise StartError(
            f"ValueError: Available memory on node 0 ({gib(free)}/{gib(total)} GiB) on kv cache allocation is less "
            f"than requested memory for kv ({gib(kv)} GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, "
            "or reduce CPU memory used by other processes."
        )
    if kv is not None:
        log(who, "cpu_worker.py:260", f"Explicitly set ({gib(kv)}/{gib(total)}) GiB for KV cache on node 0.")
        return kv
    wanted = int(total * options.utilization)
    kv = wanted - used
    if faults.device != "cpu":
        log(who, "gpu_worker.py:760", f"Available KV cache memory: {gib(kv)} GiB")
    elif kv <= 0:
        raise StartError(
            f"ValueError: Available memory on node 0 ({gib(free)}/{gib(total)} GiB) on kv cache allocation is less "
            f"than requested memory for kv ({gib(kv)}/{gib(wanted)} GiB). Reduce CPU memory used by other processes."
        )
    else:
        log(
            who,
            "cpu_worker.py:260",
            f"Auto set ({gib(kv)}/{gib(total)}) GiB for KV cache on node 0, with {gib(wanted)} GiB requested memory "
            f"for the worker. {gib(used)} GiB memory was consumed by non-kv usages.",
        )
    return kv


def capture_graphs(who: str, start: Start) -> None:
    """CUDA only: the graphs, then what vLLM learned of its own need."""
    options, faults, model = start
    if faults.device == "cpu":
        return
    if not options.eager:
        for done in range(3):
            write(2, f"\rCapturing CUDA graphs (decode, FULL): {50 * done:3d}%|{'█' * (5 * done):10}| {done}/2")
        live("graphs", faults)
        bare("")
        log(who, "gpu_model_runner.py:6402", "Graph capturing finished in 1 secs, took 0.25 GiB")
    if options.kv_bytes is None:
        total, free = memory(faults)
        wanted = int(total * options.utilization)
        spare = wanted - model.weights - GIB * 3 // 4 - (150 << 20)
        log(
            who,
            "gpu_worker.py:1019",
            f"Free memory on device ({gib(free)}/{gib(total)} GiB) on startup. Desired GPU memory utilization is "
            f"({options.utilization}, {gib(wanted)} GiB). Actual usage is {gib(model.weights)} GiB for consumed memory "
            "(weights + non-torch), 0.5 GiB for peak activation, and 0.25 GiB for CUDAGraph memory. Replace "
            f"gpu_memory_utilization config with `--kv-cache-memory={spare}` ({gib(spare)} GiB) to fit into requested "
            f"memory, or `--kv-cache-memory={spare + free - wanted}` ({gib(spare + free - wanted)} GiB) to fully "
            f"utilize gpu memory. Current kv cache memory in use is {gib(wanted - resident())} GiB.",
        )


def progress(what: str, done: int, count: int) -> None:
    """One step of the loader's bar: a carriage return before, a line feed after."""
    rate = "?it/s" if done == 0 else "12.50it/s"
    write(2, f"\r{what}: {100 * done // count:3d}% Completed | {done}/{count} [00:00<00:00, {rate}]\n")


def memory(faults: Faults) -> tuple[int, int]:
    """Total and available bytes of the device: FAKE_TOTAL, all of it free, or the machine's."""
    if faults.total:
        return faults.total, faults.total
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return tuple(int(rows[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def gib(size: int) -> str:
    """Bytes as vLLM prints them: GiB, two digits, no trailing zero beyond the first."""
    return str(round(size / GIB, 2))
