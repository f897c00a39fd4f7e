"""Twenty starts that cannot be, each refused: the whole `vllmctl start` and the daemon's part of it.

With real vLLM, none of which is ever run: its sources are what the preflight reads. vLLM itself takes 13 to 77 s to say
the same.
"""

import json
import os
import socket
import time
from pathlib import Path
from statistics import median

from tests.bench.figures import Figure, spread
from tests.bench.stage import daemon_in, scratch
from tests.e2e.daemon import ROOT, Daemon
from tests.fake.make_model import make_model
from vllmd.ctl.faults import Refused

ENGINE = ROOT / ".engine"


def run(rounds: int) -> list[Figure]:
    """Medians of each kind; the slowest kind counts."""
    with scratch() as folder, socket.create_server(("127.0.0.1", 0)) as stranger:
        cases = impossible(folder, stranger.getsockname()[1])
        models = "".join(f"[models.{name}]\n{table}\n" for name, table in cases.items())
        with daemon_in(folder, ENGINE, models) as daemon:
            daemon.start()
            whole: dict[str, list[float]] = {name: [] for name in cases}
            inside: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(rounds):
                for name in cases:
                    inside[name].append(refuse(daemon, name))
                    done = daemon.ctl("start", name)
                    assert done.code and f"cannot start {name}" in done.err + done.out, done
                    whole[name].append(done.seconds)
    return [
        slowest(f"preflight: vllmctl start, slowest of {len(cases)} refusals", whole, "ms", 1000.0),
        slowest("... the daemon's part", inside, "ms"),
    ]


def slowest(measure: str, times: dict[str, list[float]], unit: str, target: float | None = None) -> Figure:
    """The kind with the largest median; the median of all beside it."""
    medians = {name: median(took) * 1e3 for name, took in times.items()}
    name = max(medians, key=medians.__getitem__)
    every = [each for took in times.values() for each in took]
    detail = f"{name}; all: median {median(medians.values()):.0f}, {spread(every, 1e3)}"
    return Figure(measure, medians[name], unit, target, detail)


def refuse(daemon: Daemon, name: str) -> float:
    """Seconds of the request alone."""
    began = time.perf_counter()
    try:
        answer = daemon.client.post(f"/api/v1/models/{name}/start")
    except Refused:
        return time.perf_counter() - began
    raise AssertionError(f"{name} was not refused: {answer}")


def impossible(folder: Path, taken: int) -> dict[str, str]:
    """Tables by the name of what is wrong with them."""
    good = path(make_model(folder / "good"))
    plain = folder / "plain"
    plain.write_text("#!/bin/sh\n")
    config = folder / "no-config"
    (make_model(config) / "config.json").unlink()
    damaged = folder / "damaged"
    (make_model(damaged) / "config.json").write_text('{"model_type": ')
    empty = folder / "no-weights"
    (make_model(empty) / "model.safetensors").unlink()
    shards = make_model(folder / "shards")
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    cut = make_model(folder / "cut")
    os.truncate(cut / "model.safetensors", (cut / "model.safetensors").stat().st_size - 1000)
    code = make_model(folder / "code", model_type="no_such_type", auto_map={"AutoConfig": "configuration_x.X"})
    return {
        "no-executable": f'model = {good}\nexecutable = "/nonexistent/vllm"',
        "not-executable": f"model = {good}\nexecutable = {path(plain)}",
        "unknown-flag": f"model = {good}\nargs = {{ enforce-eagre = true }}",
        "short-flag": f"model = {good}\nargs = {{ max-num-batched = 512 }}",
        "no-model": f"model = {path(folder / 'goood')}",
        "model-is-a-file": f"model = {path(plain)}",
        "no-config": f"model = {path(config)}",
        "config-damaged": f"model = {path(damaged)}",
        "no-weights": f"model = {path(empty)}",
        "shard-missing": f"model = {path(shards)}",
        "weights-cut": f"model = {path(cut)}",
        "offline": 'model = "nobody/nothing"\nenv = { HF_HUB_OFFLINE = "1" }',
        "context-too-long": f"model = {good}\nmax_model_len = 4096",
        "needs-remote-code": f"model = {path(code)}",
        "no-compiler": f'model = {good}\nargs = {{ enforce-eager = false }}\nenv = {{ CXX = "no-such-compiler" }}',
        "port-taken": f"model = {good}\nport = {taken}",
        "vram-too-small": f'model = {good}\nvram = "256MiB"',
        "kv-too-small": f'model = {good}\nkv_cache = "128KiB"',
        "too-big": f'model = {good}\nvram = "17GiB"',
        "device-missing": f'model = {good}\ngpus = ["GPU-00000000-0000-0000-0000-000000000000"]',
    }


def path(where: Path) -> str:
    return json.dumps(str(where))
