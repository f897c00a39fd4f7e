"""Why an engine ended: whole logs of real failures, one line for each rule, and the exits that tell nothing."""

import json
import time
from pathlib import Path

import pytest

from vllmd.core.cause import _EXCEPTION, Rules, diagnose, parse_rules
from vllmd.core.logline import LONGEST, parse, severity
from vllmd.edge.logtext import split
from vllmd.edge.rules import load_rules
from vllmd.facts import Phase
from vllmd.spec import Cause

LOGS = Path(__file__).parent / "data" / "logs"
RULES = parse_rules(load_rules())


def why(
    *lines: str, status: int | None = 1, what: str = "exited with code 1", phase: Phase | None = Phase.IMPORT,
    ready: bool = False,
) -> Cause:  # fmt: skip
    return diagnose(lines, status=status, what=what, phase=phase, rules=RULES, ready=ready)


def of_log(name: str, *, status: int | None = 1, ready: bool = False) -> Cause:
    return why(*split((LOGS / f"{name}.log").read_bytes()), status=status, ready=ready, what="EngineCore (pid 6) died")


def remedies(cause: Cause) -> list[str]:
    return [remedy.text for remedy in cause.remedies]


# -- real failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "kind", "text", "remedy"),
    [
        (
            "fail-arch", "not-servable", "this vLLM does not know the architecture NoSuchForCausalLM",
            "take a vLLM that does (model key `environment`)",
        ),
        ("fail-flag", "bad-flag", "vLLM does not know: --no-such-flag 3", "correct or remove it in `args`"),
        ("fail-path", "path-wrong", "/nonexistent/model does not exist, or cannot be read", "correct `model`"),
        ("fail-kv-small", "kv-too-small", "max_model_len 512 needs more KV cache than is left", "max_model_len = 128"),
        (
            "fail-kv-large", "kv-too-large",
            "the KV cache is to have 30.0 GiB, 6.25 of 7.59 GiB are free on NUMA node 0",
            "lower kv_cache or vram below 6.25GiB",
        ),
        (
            "fail-max-len", "context-too-long", "max_model_len 4096 is more than the model was made for: 2048",
            "max_model_len = 2048",
        ),
        (
            "fail-util-small", "kv-too-small",
            "the worker itself takes more than its 0.38 GiB, and nothing is left for the KV cache", "more vram",
        ),
    ],
)  # fmt: skip
def test_a_start_that_cannot_succeed_is_explained(log: str, kind: str, text: str, remedy: str) -> None:
    """The first cause is found among its consequences, with its numbers; it is not tried again."""
    cause = of_log(log)
    assert (cause.kind, cause.text, remedies(cause)[0]) == (kind, text, remedy)
    assert not cause.heals
    assert cause.phase == "import"


@pytest.mark.parametrize(
    ("log", "kind", "text"),
    [
        ("fail-port", "port-taken", "something else listens on the engine's port or socket"),
        ("fail-util-large", "memory-taken", "6.12 of 7.46 GiB are free on NUMA node 0, 7.39 GiB are needed"),
    ],
)
def test_a_start_that_may_succeed_later_is_explained(log: str, kind: str, text: str) -> None:
    """What the world took it may give back."""
    cause = of_log(log)
    assert (cause.kind, cause.text, cause.heals) == (kind, text, True)


@pytest.mark.parametrize(
    ("log", "kind", "text"),
    [
        (
            "kill-engine",
            "engine-died",
            "EngineCore (pid 6) died; its log does not say why, so perhaps the kernel killed",
        ),
        ("kill-worker", "worker-died", "a worker process died (VllmWorker-0), perhaps killed by the kernel"),
    ],
)
def test_a_process_that_was_killed_is_named(log: str, kind: str, text: str) -> None:
    """The leader exits with 0; the words that follow are endings, not causes."""
    cause = of_log(log, status=0, ready=True)
    assert (cause.kind, cause.heals, cause.phase) == (kind, True, "")
    assert cause.text.startswith(text)


# -- one line for each rule -------------------------------------------------------------------------------------------

SAMPLES = [
    ("ImportError: This modeling file requires the following packages that were not found in your environment: verovio. "
     "Run `pip install verovio`", "needs Python packages that its environment lacks: verovio"),
    ("ImportError: This modeling file requires the following packages that were not found in your environment: einops, "
     "timm. Run `pip install einops timm`", "needs Python packages that its environment lacks: einops, timm"),
    ("ValueError: The repository a/b contains custom code which must be executed to correctly load the model.",
     "brings Python code of its own"),
    ("OSError: You are trying to access a gated repo.", "the model is gated"),
    ("OSError: a/b is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
     "a/b is neither a folder here nor a model on the hub"),
    ("huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: x)", "the hub has no such model"),
    ("HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/nope'. Use",
     "/nope does not exist"),
    ("HFValidationError: Repo id must use alphanumeric chars, '-', '_' or '.'. The name cannot start or end with '-' or "
     "'.' and the maximum length is 96: '/nope'.", "/nope does not exist"),
    ("ValueError: Invalid repository ID or local directory specified: 'x'.", "neither a readable folder"),
    ("OSError: v9 is not a valid git identifier (branch name, tag name or commit id) that exists", "no revision v9"),
    ("OSError: It looks like the config file at '/m/config.json' is not a valid JSON file.", "/m/config.json is not"),
    ("requests.exceptions.ReadTimeout: HTTPSConnectionPool(host='hub', port=443): Read timed out.", "was interrupted"),
    ("huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the specified "
     "revision on the local disk", "not in the cache"),
    ("UserWarning: Not enough free disk space to download the file. The expected file size is: 4967.22 MB. The target "
     "location /c only has 812.10 MB free disk space.", "needs 4967.22 MB, 812.10 MB are free"),
    ("OSError: [Errno 28] No space left on device", "no space left"),
    ("RuntimeError: Cannot find any model weights with `/m`", "/m holds no weights"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge", "cut short or damaged"),
    ("ValueError: Couldn't instantiate the backend tokenizer from one of: ", "tokenizer cannot be loaded"),
    ("  Value error, Model architectures ['GOTQwenForCausalLM'] are not supported for now. Supported architectures: x",
     "vLLM does not serve GOT-OCR (GOTQwenForCausalLM)"),
    ("AttributeError: 'GotOcr2Processor' object has no attribute '_get_num_multimodal_tokens'", "vLLM has no code for"),
    ("  Value error, Model architectures ['AForB', 'CForD'] are not supported for now. Supported architectures: x",
     "does not know the architecture AForB"),
    ("ValueError: Model architecture PhiMoE was supported in vLLM until v0.9.2, and is not supported anymore.",
     "knew the architecture PhiMoE until version 0.9.2"),
    ("ValueError: Model architecture Bart is not supported in-tree anymore. Please install the plugin at https://x/bart if",
     "serves the architecture Bart only with a plugin"),
    ("ValueError: The checkpoint you are trying to load has model type `new` but Transformers does not recognize this "
     "architecture. This could be", "does not know the model type new"),
    ("ValueError: The Transformers implementation of 'X' is not compatible with vLLM.", "cannot use the one in transformers"),
    ("ValueError: Model architectures ['X'] failed to be inspected. Please check the logs", "cannot be imported"),
    ("vllm: error: unrecognized arguments: --no-such-flag", "vLLM does not know: --no-such-flag"),
    ("vllm serve: error: argument --max-model-len: invalid value: 'x'", "this value of --max-model-len: invalid value: 'x'"),
    ("vllm serve: error: ambiguous option: --max could match --max-model-len, --max-num-seqs", "--max may mean any of"),
    ("ValueError: User-specified max_model_len (4096) is greater than the derived max_model_len (max_position_embeddings="
     "2048.0 or", "max_model_len 4096 is more than the model was made for: 2048"),
    ("ValueError: User-specified max_model_len is odd", "max_model_len is more than the model was made for"),
    ("  Value error, Sleep mode is not supported on current platform. [type=value_error", "no sleep mode"),
    ("ValueError: To serve at least one request with the model's max seq len (512), (0.0 GiB KV cache is needed, which is "
     "larger than the available KV cache memory (0.0 GiB). Based on the available memory, the estimated maximum model "
     "length is 128. Try", "max_model_len 512 needs more KV cache"),
    ("ValueError: To serve at least one request with the model's max seq len (32768), (4.1 GiB KV cache is needed, which "
     "is larger than the available KV cache memory (1.2 GiB). Based on the available memory, the estimated maximum model "
     "length is 9584. Try", "max_model_len 32768 needs 4.1 GiB of KV cache, 1.2 GiB is left"),
    ("ValueError: No available memory for the cache blocks. Try increasing", "takes all of its vram"),
    ("ValueError: Cannot auto-fit max_model_len: not enough GPU memory available", "not even one token fits"),
    ("ValueError: Free memory on device cuda:0 (3.02/11.63 GiB) on startup is less than desired GPU memory utilization "
     "(0.92, 10.7 GiB). Decrease", "3.02 of 11.63 GiB are free on cuda:0, 10.7 GiB are needed"),
    ("AssertionError: Error in memory profiling. Initial free memory 82.94 GiB, current free memory 90.17 GiB. This",
     "another program freed GPU memory"),
    ("Failed to load model - not enough GPU memory. Try lowering", "the weights do not fit"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 130.00 MiB. GPU 0 has a total capacity of 11.63 GiB of "
     "which 64.81 MiB is free. Including", "130.00 MiB more were wanted, 64.81 MiB were free"),
    ("torch.cuda.OutOfMemoryError: allocation failed", "out of GPU memory"),
    ("ValueError: Available memory on node 0 (9.88/13.46 GiB) on startup is less than desired CPU memory utilization "
     "(0.99, 13.33 GiB).", "9.88 of 13.46 GiB are free on NUMA node 0, 13.33 GiB are needed"),
    ("ValueError: Available memory on node 0 (6.2/7.5 GiB) on kv cache allocation is less than requested memory for kv "
     "(-0.46/0.13 GiB).", "takes more than its 0.13 GiB"),
    ("ValueError: Available memory on node 1 (6.2/7.5 GiB) on kv cache allocation is less than requested memory for kv "
     "(30.0 GiB).", "is to have 30.0 GiB, 6.2 of 7.5 GiB are free on NUMA node 1"),
    ("RuntimeError: Insufficient space in /dev/shm for the message queue: 160 MiB required, 64 MiB free. Increase",
     "/dev/shm has 64 MiB left, 160 MiB are needed"),
    ("RuntimeError: Failed to infer device type, please set", "finds no device"),
    ("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has",
     "too old for bfloat16"),
    ("ValueError: No valid attention backend found for cuda with AttentionSelectorConfig(", "takes these settings on cuda"),
    ("ValueError: The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. Current "
     "capability: 75.", "quantisation (fp8)"),
    ("RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver",
     "is not the one that is installed"),
    ("RuntimeError: CUDA driver version is insufficient for CUDA runtime version", "driver is too old"),
    ("torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device", "no code for this GPU"),
    ("RuntimeError: No CUDA GPUs are available", "CUDA finds no GPU"),
    ("torch.AcceleratorError: CUDA error: invalid device ordinal", "wants more GPUs"),
    ("torch.distributed.DistBackendError: NCCL error in: x.cpp:94, unhandled system error", "cannot talk to each other"),
    ("torch.AcceleratorError: CUDA error: device-side assert triggered", "CUDA error: device-side assert triggered"),
    ("/sys/fs/cgroup/x/cgroup.procs: 1: exec: /nowhere/vllm: not found", "cannot run /nowhere/vllm: not found"),
    ("OSError: [Errno 98] Address already in use", "something else listens"),
    ("RuntimeError: Failed to find C compiler. Please specify via CC", "there is no C compiler"),
    ("torch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found in", "there is no C++ compiler"),
    ("RuntimeError: Could not find nvcc and default cuda_home", "nvcc or ninja is missing"),
    ("OSError: [Errno 24] Too many open files", "may not open as many files"),
    ('zmq.error.ZMQError: ipc path "/x" is longer than 107 characters (sizeof(sockaddr_un.sun_path)).', "too long"),
    ("ValueError: VLLM_PORT 'tcp://10.0.0.1:80' appears to be a URI.", "VLLM_PORT is tcp://10.0.0.1:80"),
    ("PermissionError: [Errno 13] Permission denied: '/var/cache/x'", "/var/cache/x: Permission denied"),
    ("Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.", "died (VllmWorker-1)"),
    ("No available shared memory broadcast block found in 60 seconds.", "does not answer"),
    ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", "its log does not say why"),
    ("RuntimeError: Engine core initialization failed. See root cause above.", "without saying why"),
]  # fmt: skip


@pytest.mark.parametrize(("at", "line", "text"), [(at, *sample) for at, sample in enumerate(SAMPLES)])
def test_each_rule_knows_its_line(at: int, line: str, text: str) -> None:
    """The samples stand in the order of the rules, one each, and no rule before takes another's line."""
    rule = RULES.rows[at]
    assert rule.pattern.search(line)
    found = next(row for row in RULES.rows if row.pattern.search(line))
    assert found is rule
    cause = why(f"(EngineCore pid=6) ERROR 11-23 03:40:02 [core.py:1510] {line}")
    assert text in cause.text
    assert "?" not in cause.text and "{" not in cause.text + "".join(remedies(cause)).replace("= {", "")


def test_every_rule_has_a_sample_and_fits_a_table() -> None:
    """`short` is at most 24 characters; a sentence does not end with a full stop."""
    assert len(RULES.rows) == len(SAMPLES)
    for rule in RULES.rows:
        assert len(rule.short) <= 24, rule.short
        assert not rule.text.endswith("."), rule.text


# -- which line counts ------------------------------------------------------------------------------------------------

ERROR = "(EngineCore pid=6) ERROR 11-23 03:40:02 [core.py:1510] "
WARNING = "(APIServer pid=5) WARNING 11-23 03:40:02 [system_utils.py:255] "
TRACE = "Traceback (most recent call last):"


def test_a_warning_is_not_a_cause() -> None:
    """Every start on a machine with a low limit warns of "Too many open files"."""
    assert of_log("fail-flag").kind == "bad-flag"
    warned = why(WARNING + "This can cause errors like `OSError: [Errno 24] Too many open files`.")
    assert warned.kind == "exited"


def test_a_warning_that_names_the_cause_is_one() -> None:
    """Where a rule says so, and nothing serious is known."""
    assert why(WARNING + "No available shared memory broadcast block found in 60 seconds.").kind == "worker-hung"


def test_the_program_that_a_traceback_quotes_is_not_its_words() -> None:
    """The line of source that raises has the text without its numbers."""
    cause = why(TRACE, '  File "a.py", line 1, in f', '    raise ValueError("Too many open files")', "ValueError: odd")
    assert (cause.kind, cause.text) == ("crashed", "crashed while importing vLLM: ValueError: odd")


def test_an_exception_that_no_rule_knows_is_told() -> None:
    """The innermost process's, which is the first; its consequences are not."""
    cause = why(
        ERROR + "EngineCore failed to start.", ERROR + TRACE, ERROR + '  File "a.py", line 1, in f', ERROR + "    x()",
        ERROR + "some.module.OddError: the widget is bent", "Worker proc W died unexpectedly (exit code: None), shutting",
        TRACE, "  File", "RuntimeError: Engine core initialization failed. See root cause above.",
        phase=Phase.LOAD,
    )  # fmt: skip
    assert cause.text == "crashed while loading weights: OddError: the widget is bent"
    assert (cause.kind, cause.detail, cause.phase, cause.heals) == (
        "crashed", "OddError: the widget is bent", "load", True,
    )  # fmt: skip


def test_what_pydantic_found_is_told() -> None:
    """It says it in the next line."""
    first = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"
    cause = why(TRACE, first, "  Value error, the widget is bent [type=value_error, input_value=x]")
    assert cause.detail == "ValidationError: 1 validation error for ModelConfig: the widget is bent"


def test_errors_of_requests_long_ago_are_not_the_end() -> None:
    """Of an engine that served, only the last words count."""
    old = [ERROR + "ValueError: Too many open files"] + ["INFO:     GET /health"] * 200
    fatal = [ERROR + "torch.AcceleratorError: CUDA error: an illegal memory access was encountered", ERROR + "x"]
    died = [ERROR + "EngineCore encountered a fatal error."]
    cause = why(*old, *fatal, *died, *old, status=0, ready=True, phase=None)
    assert (cause.kind, cause.heals) == ("cuda-error", True)
    assert cause.text == "CUDA error: an illegal memory access was encountered"


def test_what_heals_may_depend_on_whether_it_served() -> None:
    """Out of memory while it starts comes again; while it serves it need not."""
    line = ERROR + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"
    assert not why(line).heals
    assert why(line, ready=True).heals


# -- exits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (0, "exited", "exited by itself with code 0 while importing vLLM"),
        (3, "exited", "exited by itself with code 3 while importing vLLM"),
        (-9, "killed", "killed by SIGKILL from outside while importing vLLM, perhaps by the kernel for lack of memory"),
        (-15, "killed", "ended by SIGTERM from outside while importing vLLM"),
        (-11, "crashed", "crashed with SIGSEGV while importing vLLM"),
        (-99, "crashed", "crashed with signal 99 while importing vLLM"),
        (
            None,
            "engine-died",
            "Worker (pid 7) died while importing vLLM; its log does not say why, so perhaps it was killed",
        ),
    ],
)
def test_an_exit_without_words_is_told_by_itself(status: int | None, kind: str, text: str) -> None:
    """Any exit that nobody asked for is a crash, whatever its code."""
    cause = why(status=status, what="Worker (pid 7) died")
    assert (cause.kind, cause.text, cause.heals) == (kind, text, True)
    assert len(cause.short) <= 24


def test_what_never_ran_cannot_heal() -> None:
    """The sentence is the caller's; the remedy names what there is to mend."""
    cause = why(what="cannot run /x/vllm: Permission denied", status=127)
    assert (cause.kind, cause.text, cause.heals) == ("cannot-run", "cannot run /x/vllm: Permission denied", False)
    assert "executable" in cause.remedies[0].text


def test_what_could_not_run_just_now_may_heal() -> None:
    """126: no processes or descriptors left."""
    cause = why(what="cannot run /x/vllm: Resource temporarily unavailable", status=126)
    assert (cause.kind, cause.heals) == ("cannot-run", True)
    assert "LimitNOFILE" in cause.remedies[0].text


# -- output that means harm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ['{"a":' * 3200, '{"message": ' + "[" * 900 + "]" * 900 + "}", "{" * 16000])
def test_a_line_that_is_nested_too_deeply_is_bare_text(line: str) -> None:
    """Nothing of it is raised, neither here nor for the journal."""
    assert len(parse(line).text) <= LONGEST
    assert severity(line) == 6
    assert why(line, status=1).kind == "exited"


@pytest.mark.parametrize(
    "line",
    ["A" * 16_000 + "(", "a" * 16_000, "a." * 8000, "1:" * 8000, "quantization method " * 800, "model type a" * 1300,
     "(" * 16_000, "INFO 11-24 01:42:29 [" * 700, "Warning" * 2000],
)  # fmt: skip
def test_no_line_takes_long(line: str) -> None:
    """The longest that a log may have, of what regular expressions choke on; 8 s before."""
    began = time.process_time()
    why("Traceback (most recent call last):", line, status=1)
    severity(line)
    assert time.process_time() - began < 0.25


def test_what_tells_an_exception_takes_no_longer_than_the_line_is_long() -> None:
    """Also on a whole one: 16 KiB took seconds."""
    began = time.process_time()
    for line in ("A" * 16_000 + "(", "a." * 8000 + "(", "aA." * 5000 + "("):
        assert _EXCEPTION.fullmatch(line) is None
    assert time.process_time() - began < 0.1


def test_the_end_of_a_long_line_counts() -> None:
    """As JSON a whole traceback is one line, and what is wrong stands last."""
    trace = "Traceback (most recent call last):\n" + "  File x\n" * 1000 + "CUDA out of memory"
    line = json.dumps({"levelname": "ERROR", "message": "failed", "exc_info": trace})
    assert why(line, status=1).kind == "out-of-memory"


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"pattern": "("}, "cannot use rule k: its pattern is wrong"),
        ({"text": "{nothing}"}, "cannot use rule k: 'nothing' is neither a key of it nor a group"),
        ({"short": None}, "cannot use rule k: 'short' is neither"),
    ],
)
def test_a_wrong_rule_is_named(row: dict[str, str | None], problem: str) -> None:
    """When the file is loaded, not when a model fails."""
    whole = {"kind": "k", "pattern": "p", "short": "s", "text": "t"} | row
    with pytest.raises(ValueError, match="cannot use rule") as caught:
        parse_rules({"version": 1, "rule": [{key: value for key, value in whole.items() if value is not None}]})
    assert str(caught.value).startswith(problem)


def test_a_remedy_without_its_number_is_left_out() -> None:
    """vLLM does not always offer one."""
    raw = {"kind": "k", "pattern": r"no(?: (?P<n>\d+))?", "short": "s", "text": "t", "remedies": ["len = {n}", "more"]}
    rules: Rules = parse_rules({"version": 1, "rule": [raw]})
    for line, count in (("no 7", 2), ("no", 1)):
        cause = diagnose([line], status=1, what="", phase=None, rules=rules)
        assert len(cause.remedies) == count
