"""The two tables that go to vLLM as they are, `args` and `env`, and what in them belongs to vllmd.

vllmd owns what the budget, the life of the process and the way to it depend on. Such a flag or variable is refused by
name, with what to write instead: passed on silently it would break the promise that everything fits.
"""

import math
import re
from typing import Any, Final

from vllmd.config.kinds import Bad, Fault, Kind, Place, bad, text
from vllmd.config.problems import Key, Substituted, quote

OWNED_FLAGS: Final = {
    "model": "write the key model",
    "host": "engines are reachable by vllmd only; write port for a port on 127.0.0.1",
    "port": "write the key port",
    "uds": "a model without port gets a unix socket",
    "served-model-name": "it is the model's name; further names are aliases",
    "gpu-memory-utilization": "vllmd computes it; write vram",
    "device-memory-utilization": "vllmd computes it; write vram",
    "kv-cache-memory": "write kv_cache",
    "kv-cache-memory-bytes": "write kv_cache",
    "max-model-len": "write the key max_model_len",
    "shutdown-timeout": "write drain",
    "tensor-parallel-size": "write gpus",
    "device-ids": "write gpus",
    "data-parallel-size": "write replicas",
    "enable-sleep-mode": "write swap",
    "api-key": "engines are reachable by vllmd only and need no key",
    "hf-token": 'everybody could read it in the process list; write env = { HF_TOKEN = "${credential:NAME}" }',
    "config": "write its flags into args: in a file they would go unchecked",
    "headless": "without its API server vllmd cannot see a model",
    **dict.fromkeys(
        ("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers", "enable-ssl-refresh"),
        "TLS belongs in front of vllmd, not between it and its engines",
    ),
}
#: vLLM's short spellings, which stand after one dash.
SHORT_FLAGS: Final = {
    "tp": "tensor-parallel-size",
    "pp": "pipeline-parallel-size",
    "dp": "data-parallel-size",
    "q": "quantization",
    "asc": "api-server-count",
    "cc": "compilation-config",
    "sc": "speculative-config",
    "ac": "attention-config",
}
#: Flags that their names alone do not show to be some: of one word, or like a key of ours.
_PLAIN_FLAGS: Final = frozenset(
    (
        "convert", "dtype", "grpc", "middleware", "quantization", "revision", "runner", "seed", "tokenizer",
        "kv-cache-dtype", "kv-cache-metrics", "max-log-len", "max-lora-rank", "max-loras", "model-impl", "spec-model",
    )
)  # fmt: skip
OWNED_ENV: Final = {
    "CUDA_VISIBLE_DEVICES": "write gpus",
    "CUDA_DEVICE_ORDER": "vllmd sets PCI_BUS_ID, so that indices mean what the driver says",
    "VLLM_PORT": "it is not the port of the API; write port",
    "VLLM_CPU_KVCACHE_SPACE": "write kv_cache",
    "VLLM_RPC_BASE_PATH": "vllmd gives each engine its own directory",
    "TMPDIR": "vllmd gives each engine its own directory",
    "VLLM_API_KEY": "engines are reachable by vllmd only and need no key",
}
_FLAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEPTH: Final = 16


def flag_name(written: str) -> str:
    """The flag, its underscores made dashes; a dotted tail (`a.b_c`) is JSON's and stays. Raises Bad."""
    bare = written.lstrip("-")
    if bare != written and _FLAG.fullmatch(bare):
        flag = SHORT_FLAGS.get(bare, bare.replace("_", "-"))
        refuse_owned(flag)
        raise bad("flags are written without dashes in front", f"try {flag}")
    if not _FLAG.fullmatch(written):
        raise bad(f"{quote(written)} is not the name of a flag")
    head, dot, tail = written.partition(".")
    flag = head.replace("_", "-") + dot + tail
    refuse_owned(head.replace("_", "-").lower())
    return flag


def spelling(written: str) -> str:
    """What is the same for all ways to write a flag in a table: with dashes or underscores, `no-` in front or not."""
    head, dot, tail = written.partition(".")
    return head.replace("_", "-").removeprefix("no-") + dot + tail


def as_key(key: str, value: Any, near: bool) -> str | None:
    """What to do with a key of a model that is a flag of vLLM, or looks like one; None if it does not. `near` = there
    is a key of ours that it may have been meant to be."""
    flag = SHORT_FLAGS.get(key.lower(), key.lower().replace("_", "-"))
    if flag in OWNED_FLAGS:
        return OWNED_FLAGS[flag]
    if flag not in _PLAIN_FLAGS and (near or "-" not in flag.strip("-") or not _FLAG.fullmatch(flag)):
        return None
    plain = isinstance(value, int | float | str) and len(quote(value)) < 40
    return f"a flag of vLLM goes into args = {{ {flag} = {quote(value) if plain else '...'} }}"


def refuse_owned(flag: str) -> None:
    """Raises Bad for a flag that is vllmd's, its negation, or an abbreviation (which vLLM's parser would accept)."""
    positive = flag.removeprefix("no-")
    full = positive if positive in OWNED_FLAGS else next((o for o in OWNED_FLAGS if o.startswith(positive)), None)
    if full == positive:
        raise bad(f"--{flag} is set by vllmd", OWNED_FLAGS[full])
    if full:
        raise bad(f"--{flag} abbreviates --{full}, which is set by vllmd", OWNED_FLAGS[full])


def read_args(value: Any, _: Place) -> dict[str, Any]:
    """Flag -> value, in the order written; what is an underscore in a flag becomes a dash. Raises Bad."""
    if not isinstance(value, dict):
        raise bad(f"{quote(value)} is not a table of flags", "try { enforce-eager = true }")
    args: dict[str, Any] = {}
    faults: list[Fault] = []
    for written, said in value.items():
        try:
            flag, given = flag_name(written), said
            if flag.startswith("no-") and isinstance(said, bool):
                flag, given = flag.removeprefix("no-"), not said  # one way to say it, so that the later one counts
            if flag in args:
                first = next(other for other in value if spelling(other) == spelling(written))
                raise bad(f"--{flag} stands here twice", f"as {first} and as {written}")
            args[flag] = flag_value(given)
        except Bad as exc:
            faults += [Fault(f.message, f.hint, (written, *f.at)) for f in exc.faults]
    if faults:
        raise Bad(*faults)
    return args


def flag_value(value: Any) -> Any:
    """A string, number, switch, list of these, or a table that becomes JSON. Raises Bad."""
    match value:
        case dict():
            return json_value(value, ())
        case list():
            if not value:
                raise bad("an empty list gives the flag no value")
            for at, item in enumerate(value):
                if isinstance(item, dict | list | bool):
                    hint = "write each as a string of JSON, or the whole as a table"
                    raise Bad(Fault("a list holds strings and numbers here", hint, (at,)))
            return [word_value(item, (at,)) for at, item in enumerate(value)]
        case _:
            return word_value(value, ())


def word_value(value: Any, at: Key) -> Any:
    """One word of the command line."""
    plain = json_value(value, at)
    # The parser would take it for the next flag: a way around the owned ones.
    if isinstance(plain, str) and re.match(r"-+[^\d.]|-+$", plain):
        raise Bad(Fault(f"{quote(value)} would be read as a flag, not as a value", at=at))
    return plain


def json_value(value: Any, at: Key) -> Any:
    """A value that JSON can hold, with what a substitution made refused: a command line is for all to see."""
    if len(at) > _DEPTH:
        raise Bad(Fault("nested too deeply", at=at))
    match value:
        case Substituted():
            hint = "write it into env, or as it is"
            raise Bad(Fault("a substitution would show in the process list", hint, at))
        case bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
        case str():
            try:
                return str(text(value))
            except Bad as exc:
                raise Bad(*(Fault(f.message, f.hint, at) for f in exc.faults)) from None
        case list():
            return [json_value(item, (*at, i)) for i, item in enumerate(value)]
        case dict():
            return {key: json_value(item, (*at, key)) for key, item in value.items()}
    raise Bad(Fault(f"{quote(value)} cannot be passed to vLLM", "a string, number, true, false, list or table", at))


def read_env(value: Any, _: Place) -> dict[str, str]:
    """Name -> value of variables. Raises Bad."""
    if not isinstance(value, dict):
        raise bad(f"{quote(value)} is not a table of variables", 'try { OMP_NUM_THREADS = "2" }')
    env: dict[str, str] = {}
    faults: list[Fault] = []
    for name, given in value.items():
        try:
            if not _VARIABLE.fullmatch(name):
                raise bad(f"{quote(name)} is not the name of a variable")
            if name in OWNED_ENV:
                raise bad(f"{name} is set by vllmd", OWNED_ENV[name])
            if name.startswith("VLLMD_"):
                raise bad(f"{name} is set by vllmd", "names that begin with VLLMD_ are its own")
            env[name] = str(text(given))
        except Bad as exc:
            faults += [Fault(f.message, f.hint, (name, *f.at)) for f in exc.faults]
    if faults:
        raise Bad(*faults)
    return env


ARGS = Kind(
    "a table of flags of `vllm serve`",
    {
        "type": "object",
        "propertyNames": {
            "pattern": f"^{_FLAG.pattern}$",
            "not": {"enum": sorted({*OWNED_FLAGS, *(f.replace("-", "_") for f in OWNED_FLAGS)})},
        },
        "additionalProperties": {"type": ["string", "number", "boolean", "array", "object"]},
    },
    read_args,
)
ENV = Kind(
    "a table of environment variables",
    {
        "type": "object",
        "propertyNames": {
            "pattern": f"^{_VARIABLE.pattern}$",
            "not": {"anyOf": [{"enum": sorted(OWNED_ENV)}, {"pattern": "^VLLMD_"}]},
        },
        "additionalProperties": {"type": "string"},
    },
    read_env,
)
