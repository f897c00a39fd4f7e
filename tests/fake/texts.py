"""vLLM's words: the shape of its log lines and the errors it ends a start with, as 0.32.0 prints them.

A record goes to stdout with a prefix on each of its lines, joined by CR LF. Tracebacks that nobody caught, progress
bars and uvicorn go to stderr bare. The cause of a failed start is the first ERROR of the innermost process; two further
tracebacks, of the engine core and of the API server, say only that something failed above.
"""

import os
import sys
import time
from typing import Final, NamedTuple

TRACE: Final = "Traceback (most recent call last):"
DEAD: Final = "EngineCore encountered an issue. See stack trace (above) for the root cause."
ABOVE: Final = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
WORKER_ABOVE: Final = (
    "WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause."
)
DRAINED: Final = "cannot schedule new futures after shutdown"


class StartError(Exception):
    """A start that fails as vLLM's would; the text is the last line of the traceback, exception class included."""


class Failure(NamedTuple):
    """What FAKE_FAIL can ask for: in which phase it strikes, and the exception's text."""

    phase: str
    cause: str


FAILURES: Final = {
    "path": Failure(
        "config",
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'{model}'. Use `repo_type` argument if needed.",
    ),
    "arch": Failure(
        "config",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, Model "
        "architectures ['{arch}'] are not supported for now. Supported architectures: dict_keys(['LlamaForCausalLM', "
        "'Qwen2VLForConditionalGeneration', 'Qwen3ForCausalLM']) [type=value_error, input_value=ArgsKwargs((), "
        "{{'model': '{model}'}}), input_type=ArgsKwargs]\n    For further information visit https://errors.pydantic.dev/2.14/v/value_error",
    ),
    "package": Failure(
        "config",
        "ImportError: This modeling file requires the following packages that were not found in your environment: "
        "verovio. Run `pip install verovio`",
    ),
    "gated": Failure(
        "config",
        "OSError: You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/{model}.\n401 Client Error. Cannot access gated repo for url "
        "https://huggingface.co/{model}/resolve/main/config.json.\nAccess to model {model} is restricted. You must "
        "have access to it and be authenticated to access it. Please log in.",
    ),
    "port": Failure("bind", "OSError: [Errno 98] Address already in use"),
    "free": Failure(
        "worker",
        "ValueError: Free memory on device cuda:0 (3.02/11.63 GiB) on startup is less than desired GPU memory "
        "utilization ({utilization}, 10.7 GiB). Decrease GPU memory utilization or reduce GPU memory used by other "
        "processes.",
    ),
    "oom": Failure(
        "load",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 130.00 MiB. GPU 0 has a total capacity of "
        "11.63 GiB of which 64.81 MiB is free. Including non-PyTorch memory, this process has 11.55 GiB memory in use. "
        "Of the allocated memory 11.20 GiB is allocated by PyTorch, and 12.40 MiB is reserved by PyTorch but "
        "unallocated.",
    ),
    "profiling": Failure(
        "profile",
        "AssertionError: Error in memory profiling. Initial free memory 9.12 GiB, current free memory 10.87 GiB. This "
        "happens when other processes sharing the same container release GPU memory while vLLM is profiling during "
        "initialization. To fix this, ensure consistent GPU memory allocation or isolate vLLM in its own container.",
    ),
    "kv": Failure(
        "kv",
        "ValueError: To serve at least one request with the model's max seq len ({length}), ({needed} GiB KV cache is "
        "needed, which is larger than the available KV cache memory ({available} GiB). {estimate}Try increasing "
        "`gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine. See "
        "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.",
    ),
}
NO_BLOCKS: Final = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
    "the engine. See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)

API_FRAMES: Final = (
    ("bin/vllm", 10, "<module>"), ("vllm/entrypoints/cli/main.py", 141, "main"),
    ("vllm/entrypoints/cli/serve.py", 178, "cmd"), ("uvloop/__init__.py", 96, "run"),
    ("asyncio/runners.py", 190, "run"), ("vllm/entrypoints/launchers/api_server/entry.py", 214, "run_server"),
    ("vllm/entrypoints/launchers/api_server/entry.py", 168, "build_async_engine_client"),
)  # fmt: skip
CONFIG_FRAMES: Final = (
    *API_FRAMES, ("vllm/engine/arg_utils.py", 2611, "create_engine_config"),
    ("vllm/engine/arg_utils.py", 2308, "create_model_config"), ("vllm/transformers_utils/config.py", 742, "get_config"),
)  # fmt: skip
CLIENT_FRAMES: Final = (
    *API_FRAMES, ("vllm/v1/engine/async_llm.py", 231, "from_vllm_config"),
    ("vllm/v1/engine/core_client.py", 131, "make_async_mp_client"),
    ("vllm/v1/engine/core_client.py", 640, "launch_core_engines"),
    ("vllm/v1/engine/utils.py", 1432, "wait_for_engine_startup"),
)  # fmt: skip
ENGINE_FRAMES: Final = (
    ("vllm/v1/engine/core.py", 1476, "run_engine_core"), ("vllm/v1/engine/core.py", 1152, "__init__"),
    ("vllm/v1/engine/core.py", 166, "__init__"), ("vllm/v1/engine/core.py", 341, "_initialize_kv_caches"),
    ("vllm/v1/executor/multiproc_executor.py", 214, "_init_executor"),
)  # fmt: skip
WORKER_FRAMES: Final = (
    ("vllm/v1/executor/multiproc_executor.py", 921, "worker_main"),
    ("vllm/v1/executor/multiproc_executor.py", 702, "__init__"), ("vllm/v1/worker/worker_base.py", 402, "init_device"),
    ("vllm/v1/worker/gpu_worker.py", 318, "load_model"), ("vllm/v1/worker/gpu_model_runner.py", 5122, "load_model"),
)  # fmt: skip


def log(who: str, where: str, message: str, level: str = "INFO") -> None:
    """One record of vLLM's logger on stdout; `where` is file:line of the real call."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    prefix = f"({who} pid={os.getpid()}) {level} {stamp} [{where}] "
    write(1, "\r\n".join(prefix + line for line in message.split("\n")) + "\n")


def bare(message: str) -> None:
    """A line on stderr without a prefix: uvicorn, tqdm, an uncaught traceback."""
    write(2, message + "\n")


def write(fd: int, message: str) -> None:
    """All of it, or nothing more when the reader is gone or the disk full: a log that fails must not stop an engine."""
    data = message.encode(errors="surrogateescape")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        return


def trace(frames: tuple[tuple[str, int, str], ...], cause: str) -> str:
    """A traceback through `frames` that ends with `cause`."""
    root = f"{sys.prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/"
    steps = []
    for path, line, name in frames:
        steps += [f'  File "{root}{path}", line {line}, in {name}', "    return func(*args, **kwargs)"]
        steps += ["           ^^^^^^^^^^^^^^^^^^^^^"]
    return "\n".join([TRACE, *steps, cause])


def log_api_failure(cause: str, *, engine: bool) -> None:
    """The API server's last words: its own cause, or that the engine core failed above."""
    bare(trace(CLIENT_FRAMES, f"RuntimeError: {ABOVE}") if engine else trace(CONFIG_FRAMES, cause))


def log_engine_failure(cause: str) -> None:
    """The engine core's: logged, then once more by multiprocessing.

    Between the two it complains of the worker that it has itself shut down: a consequence that reads like a cause.
    """
    log("EngineCore", "core.py:1510", "EngineCore failed to start.\n" + trace(ENGINE_FRAMES, cause), "ERROR")
    if WORKER_ABOVE not in cause:
        late = "Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor."
        log("EngineCore", "multiproc_executor.py:315", late, "ERROR")
    bare("Process EngineCore:\n" + trace(ENGINE_FRAMES, cause))


def log_worker_failure(who: str, cause: str, *, loading: bool) -> None:
    """A worker's: the root cause, in one way while it loads and in another in a step after that."""
    if loading:
        log(who, "multiproc_executor.py:953", "WorkerProc failed to start.\n" + trace(WORKER_FRAMES, cause), "ERROR")
    else:
        where = "multiproc_executor.py:1063"
        log(who, where, "WorkerProc hit an exception.\n" + trace(WORKER_FRAMES, cause), "ERROR")
