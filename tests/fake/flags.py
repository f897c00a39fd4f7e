"""The command line of `vllm serve`: each flag is known by name, few are read, an unknown one is refused as by argparse.

argparse itself is left out: eight fakes start at once in a test, and its import is a tenth of their life.
"""

import re
import sys
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

ALIASES: Final = {
    "-tp": "tensor_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-dp": "data_parallel_size",
    "-q": "quantization",
    "-asc": "api_server_count",
    "-cc": "compilation_config",
    "-sc": "speculative_config",
    "-ac": "attention_config",
    "--device-memory-utilization": "gpu_memory_utilization",
}
SUFFIX: Final = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
USAGE: Final = "usage: vllm [-h] [-v] {chat,complete,serve,launch,bench,collect-env,run-batch} ...\n"


class Options(NamedTuple):
    """What the fake honours; sizes in bytes, times in seconds. `given` holds every flag of the line as text."""

    model: str
    given: dict[str, str | bool | list[str]]
    host: str = ""
    port: int = 8000
    uds: str | None = None
    served: tuple[str, ...] = ()
    max_model_len: int | None = None
    utilization: float = 0.92
    kv_bytes: int | None = None
    shutdown_timeout: float = 0.0
    max_num_seqs: int = 256
    workers: int = 1
    eager: bool = False
    trust: bool = False
    api_keys: tuple[str, ...] = ()
    log_level: str = "info"
    quiet_access: bool = False
    quiet_paths: tuple[str, ...] = ()


def known() -> dict[str, tuple[str, str]]:
    """Every flag by its field name: (engine | front, switch | list | value)."""
    table: dict[str, tuple[str, str]] = {}
    section = ("", "")
    for line in Path(__file__).with_name("flags.txt").read_text().splitlines():
        if line.startswith("["):
            owner, _, kind = line.strip("[]").partition(" ")
            section = (owner, kind)
        elif not line.startswith("#"):
            table.update(dict.fromkeys(line.split(), section))
    return table


def parse(argv: list[str]) -> Options:
    """`serve MODEL --flags` as Options; SystemExit 2 with argparse's words where vLLM would refuse."""
    if argv[:1] != ["serve"]:
        refuse("vllm", "argument subparser: invalid choice: " + repr(argv[0]) if argv else "no subcommand")
    given, rest = scan(argv[1:])
    strange = rest if "model" in given else rest[1:]
    if strange:
        refuse("vllm", "unrecognized arguments: " + " ".join(strange))
    model = str(given.get("model") or (rest[0] if rest else "Qwen/Qwen3-0.6B"))
    return Options(
        model=model,
        given=given,
        host=text(given, "host", ""),
        port=integer(given, "port", 8000),
        uds=text(given, "uds", "") or None,
        served=listed(given, "served_model_name") or (model,),
        max_model_len=length(given),
        utilization=real(given, "gpu_memory_utilization", 0.92),
        kv_bytes=size(given, "kv_cache_memory_bytes"),
        shutdown_timeout=real(given, "shutdown_timeout", 0.0),
        max_num_seqs=integer(given, "max_num_seqs", 256),
        workers=integer(given, "tensor_parallel_size", 1),
        eager=given.get("enforce_eager") is True,
        trust=given.get("trust_remote_code") is True,
        api_keys=listed(given, "api_key"),
        log_level=text(given, "uvicorn_log_level", "info"),
        quiet_access=given.get("disable_uvicorn_access_log") is True,
        quiet_paths=tuple(text(given, "disable_access_log_for_endpoints", "").split(",")),
    )


def scan(argv: list[str]) -> tuple[dict[str, str | bool | list[str]], list[str]]:
    """The known flags with their words, and what is left over: first the model, then what nobody knows."""
    flags = known()
    given: dict[str, str | bool | list[str]] = {}
    rest: list[str] = []
    strange: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            (strange if strange else rest).append(word)
            continue
        flag, equals, value = word.partition("=")
        name, on = field(flag, flags)
        if name is None:
            strange.append(word)
        elif flags[name][1] == "switch":
            given[name] = on
        elif flags[name][1] == "list":
            taken = [value] if equals else []
            while not equals and words and not words[0].startswith("--"):
                taken.append(words.pop(0))
            given[name] = taken
        elif equals or words:
            given[name] = value if equals else words.pop(0)
        else:
            refuse("vllm serve", f"argument {flag}: expected one argument")
    return given, rest + strange


def field(flag: str, flags: dict[str, tuple[str, str]]) -> tuple[str | None, bool]:
    """The field that a flag names, with its truth: dotted keys, underscores, --no- and unique prefixes as in vLLM."""
    if flag in ALIASES:
        return ALIASES[flag], True
    if not flag.startswith("--"):
        return None, True
    name = flag[2:].split(".")[0].replace("-", "_")
    if name in flags:
        return name, True
    if name.startswith("no_") and flags.get(name[3:], ("", ""))[1] == "switch":
        return name[3:], False
    near = [full for full in flags if name and full.startswith(name)]
    return (near[0], True) if len(near) == 1 else (None, True)


def text(given: dict[str, str | bool | list[str]], name: str, default: str) -> str:
    """The flag's one word."""
    value = given.get(name, default)
    return value if isinstance(value, str) else default


def listed(given: dict[str, str | bool | list[str]], name: str) -> tuple[str, ...]:
    """The flag's words."""
    value = given.get(name)
    return tuple(value) if isinstance(value, list) else ()


def integer(given: dict[str, str | bool | list[str]], name: str, default: int) -> int:
    """The flag's number, or argparse's refusal."""
    word = text(given, name, str(default))
    if not re.fullmatch(r"-?\d+", word):
        refuse("vllm serve", f"argument --{name.replace('_', '-')}: invalid int value: {word!r}")
    return int(word)


def real(given: dict[str, str | bool | list[str]], name: str, default: float) -> float:
    """The flag's number, or argparse's refusal."""
    word = text(given, name, str(default))
    try:
        return float(word)
    except ValueError:
        refuse("vllm serve", f"argument --{name.replace('_', '-')}: invalid float value: {word!r}")


def size(given: dict[str, str | bool | list[str]], name: str) -> int | None:
    """Bytes as vLLM reads them: 2G is 2 * 2**30, 2g is 2 * 10**9."""
    word = text(given, name, "")
    if not word:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", word)
    if not match:
        refuse("vllm serve", f"argument --{name.replace('_', '-')}: invalid human_readable_int value: {word!r}")
    return int(float(match[1]) * SUFFIX.get(match[2], 1))


def length(given: dict[str, str | bool | list[str]]) -> int | None:
    """--max-model-len in tokens; -1 stands for auto, None for the model's own."""
    if text(given, "max_model_len", "") in ("auto", "-1"):
        return -1
    return size(given, "max_model_len")


def refuse(prog: str, why: str) -> NoReturn:
    """End as argparse does: usage and one line on stderr, exit 2."""
    sys.stderr.write(f"{USAGE}{prog}: error: {why}\n")
    sys.exit(2)
