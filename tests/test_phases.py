"""What the log of a start says: on whole logs of real starts, and on the lines that only GPUs print."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from vllmd.core.logline import LogLine, parse
from vllmd.core.phases import Sign, read
from vllmd.edge.logtext import split
from vllmd.facts import Figures, Phase
from vllmd.units import GIB

LOGS = Path(__file__).parent / "data" / "logs"


def signs(name: str) -> list[Sign]:
    found = (read(line) for line in split((LOGS / f"{name}.log").read_bytes()))
    return [sign for sign in found if sign]


def figures(name: str) -> dict[str, int]:
    printed = [sign.figures for sign in signs(name) if sign.figures]
    keys = [field.name for field in fields(Figures)]
    return {key: value for one in printed for key in keys if (value := getattr(one, key)) is not None}


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("good-first", [Phase.IMPORT, Phase.LOAD, Phase.COMPILE, Phase.HTTP]),
        ("good-eager", [Phase.IMPORT, Phase.LOAD, Phase.HTTP]),
        ("good-vision", [Phase.IMPORT, Phase.LOAD, Phase.HTTP]),
    ],
)
def test_a_real_start_goes_through_its_phases_in_order(name: str, phases: list[Phase]) -> None:
    """Each once, none twice, the last one complete."""
    seen = [sign.phase for sign in signs(name) if sign.phase]
    assert list(dict.fromkeys(seen)) == phases
    assert seen == sorted(seen, key=list(Phase).index)
    assert [sign for sign in signs(name) if sign.phase][-1].fraction == 1.0


@pytest.mark.parametrize("name", ["good-first", "good-eager", "good-util", "good-vision"])
def test_measuring_is_over_once_the_cache_size_is_known(name: str) -> None:
    """Not before the weights are loaded."""
    found = signs(name)
    first = next(at for at, sign in enumerate(found) if sign.measured)
    printed = found[first].figures
    assert printed is not None
    assert printed.kv_tokens
    assert Phase.LOAD in {sign.phase for sign in found[:first]}


def test_the_figures_of_a_real_start_are_read() -> None:
    """The CPU worker's: pinned, and measured."""
    assert figures("good-first") == {"kv_bytes": GIB // 4, "kv_tokens": 524_288}
    assert figures("good-util") == {
        "kv_bytes": int(1.69 * GIB), "kv_tokens": 3_536_256, "consumed": int(0.55 * GIB),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["kill-engine", "kill-worker"])
def test_a_running_engine_gives_no_sign_of_a_start(name: str) -> None:
    """Access lines, errors and the shutdown say nothing about phases."""
    found = signs(name)
    assert found[-1] == Sign(Phase.HTTP, 1.0, measured=True)
    assert sum(sign == found[-1] for sign in found) == 1


W, E = (
    "(Worker_TP0 pid=7) INFO 11-23 03:40:02 [gpu_worker.py:1] ",
    "(EngineCore_DP0 pid=6) INFO 11-23 03:40:02 [a.py:2] ",
)
USAGE = (
    "Free memory on device (11.2/11.63 GiB) on startup. Desired GPU memory utilization is (0.58, 6.75 GiB). Actual usage "
    "is 4.1 GiB for consumed memory (weights + non-torch), 0.62 GiB for peak activation, and 0.35 GiB for CUDAGraph "
    "memory. Replace gpu_memory_utilization config with `--kv-cache-memory=1650000000` (1.54 GiB) to fit into requested "
    "memory, or `--kv-cache-memory=6400000000` (5.96 GiB) to fully utilize gpu memory. Current kv cache memory in use is "
    "1.68 GiB."
)
PINNED = (
    "Initial free memory 11.2 GiB, reserved 2.0 GiB memory for KV Cache as specified by kv_cache_memory_bytes config and "
    "skipped memory profiling. This does not respect the gpu_memory_utilization config."
)


@pytest.mark.parametrize(
    ("line", "sign"),
    [
        (
            "model-00001-of-00002.safetensors:  42%|####      | 3.1G/7.4G [00:30<00:42, 101MB/s]",
            Sign(Phase.DOWNLOAD, 0.42, "3.1G of 7.4G"),
        ),
        ("Fetching 14 files:  50%|#####     | 7/14 [00:03<00:03,  2.1it/s]", Sign(Phase.DOWNLOAD, 0.5, "7 of 14")),
        (W + "Time spent downloading weights for a/b: 73.1 seconds", Sign(Phase.DOWNLOAD, 1.0)),
        (W + "Loading model from scratch...", Sign(Phase.LOAD)),
        (
            "Loading safetensors checkpoint shards:  67% Completed | 2/3 [00:02<00:01,  1.0s/it]",
            Sign(Phase.LOAD, 0.67, "2 of 3"),
        ),
        (
            W + "Model loading took 3.96 GiB memory and 2.512345 seconds",
            Sign(Phase.MEASURE, figures=Figures(weights=int(3.96 * GIB))),
        ),
        (W + "[backbone] Dynamo bytecode transform time: 4.20 s", Sign(Phase.COMPILE)),
        (W + "Directly load the compiled graph(s) for compile range (1, 2048) from the cache", Sign(Phase.COMPILE)),
        (W + "torch.compile took 21.90 s in total", Sign(Phase.COMPILE, 1.0)),
        (W + "Available KV cache memory: 1.68 GiB", Sign(figures=Figures(kv_bytes=int(1.68 * GIB)))),
        (W + "Available KV cache memory: -3.21 GiB", Sign(figures=Figures(kv_bytes=0))),
        (W + PINNED, Sign(figures=Figures(kv_bytes=2 * GIB))),
        (E + "GPU KV cache size: 15,728 tokens", Sign(figures=Figures(kv_tokens=15_728), measured=True)),
        (
            "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  51%|#####     | 34/67 [00:03<00:03,  9.8it/s]",
            Sign(Phase.GRAPHS, 34 / 67, "34 of 67"),
        ),
        (
            W + "Graph capturing finished in 7 secs, took 0.35 GiB",
            Sign(Phase.GRAPHS, 1.0, figures=Figures(graphs=int(0.35 * GIB)), measured=True),
        ),
        (
            W + USAGE,
            Sign(
                figures=Figures(int(1.68 * GIB), None, None, int(4.1 * GIB), int(0.62 * GIB), int(0.35 * GIB)),
                measured=True,
            ),
        ),
        (E + "init engine (profile, create kv cache, warmup model) took 31.25 s", Sign(measured=True)),
        ("INFO:     Application startup complete.", Sign(Phase.HTTP, 1.0, measured=True)),
        ('INFO:     127.0.0.1:55112 - "GET /health HTTP/1.1" 200 OK', None),
        ("", None),
    ],
)
def test_each_line_of_the_table_is_read(line: str, sign: Sign | None) -> None:
    """The words of vLLM 0.32, both model runners."""
    found = read(line)
    if found is not None and sign is not None and found.fraction is not None and sign.fraction is not None:
        assert found.fraction == pytest.approx(sign.fraction, abs=0.01)
        found = Sign(found.phase, sign.fraction, found.note, found.figures, found.measured)
    assert found == sign


@pytest.mark.parametrize(
    "text",
    [
        "Model loading took 1.2.3 GiB memory", f"Model loading took {'9' * 400} GiB memory",
        f"GPU KV cache size: {'1' * 5000} tokens", "GPU KV cache size: ,,, tokens",
        "Available KV cache memory: -. GiB", f"Loading safetensors checkpoint shards: {'7' * 400}% Completed | 1/2",
        "Explicitly set (.../1) GiB for KV cache", '{"message":' * 1500,
    ],
)  # fmt: skip
def test_numbers_that_are_none_say_nothing(text: str) -> None:
    """vLLM would not print them; a model's own code may."""
    assert read(W + text) is None
    assert read(text) is None


def test_json_logs_are_read_too() -> None:
    """As written with --logging-config.formatter json."""
    record = {
        "levelname": "INFO",
        "processName": "x",
        "vllm_process_name": "Worker",
        "message": "Loading weights took 2 s",
    }
    assert read(json.dumps(record)) == Sign(Phase.LOAD, 1.0)
    assert parse(json.dumps(record)) == LogLine("Worker", "INFO", "Loading weights took 2 s")
    assert read('{"not": "a record"}') is None
    assert read("{broken") is None


def test_a_record_behind_an_unfinished_bar_is_read() -> None:
    """Two processes share the file, and a bar has no end of line yet."""
    line = "Loading: 50%|##  | 1/2" + E + "GPU KV cache size: 1,024 tokens"
    assert parse(line) == LogLine("EngineCore_DP0", "INFO", "GPU KV cache size: 1,024 tokens")
