"""docs/config.md, from the table of keys."""

import json
from typing import Any, Final

from vllmd.config.engine import OWNED_ENV, OWNED_FLAGS
from vllmd.config.options import SECTIONS, Option, Section

_HEAD: Final = """# Configuration

Printed from `vllmd/config/options.py` (`python -m vllmd.config.options`); do not edit.

`/etc/vllmd/vllmd.toml` is a TOML file; `vllmd --config FILE` and `$VLLMD_CONFIG` name another one, and who is not root
has `~/.config/vllmd/vllmd.toml`. `vllmd --check-config` and `vllmctl validate` print every problem with file and line.

```toml
[devices."*"]
limit = "11GiB"

[defaults]
executable = "/opt/vllm/bin/vllm"

[models.dots-ocr]
model = "rednote-hilab/dots.ocr"
category = ["ocr"]
vram = "7400MiB"
max_model_len = 8192
port = 8000
autostart = true
args = { enforce-eager = true, trust-remote-code = true, limit-mm-per-prompt = { image = 1 } }
env = { OMP_NUM_THREADS = "2" }
```

- **Sizes** have a unit: `"9GiB"`, `"512MiB"` (powers of two), `"9GB"` (of ten). **Durations** too: `"90s"`, `"10m"`,
  `"1h30m"`.
- **Paths** may begin with `~/`; relative ones start at the folder of the file they stand in.
- **Names of models** are lower-case letters, digits, `.`, `_` and `-`, at most 63 characters, the first a letter or
  digit. One with a dot needs quotes in its header: `[models."qwen2.5-vl-3b"]`.
- **Drop-ins**: `vllmd.toml.d/*.toml` beside `vllmd.toml`, merged in name order. Tables merge, everything else replaces.
- **Substitutions**: `${env:NAME}` in any string but those of `args`, and `${credential:NAME}` in `env` tables: a file of
  that name in `/etc/vllmd/credentials`, or `LoadCredential=NAME:/path` in the unit (systemd reads both when the service
  starts). What is substituted in `env` is secret: it is not shown in messages, logs, status or `vllmctl show`. vllmd
  refuses a file in which one is missing; `vllmctl validate` asks a running vllmd, and where there is none warns of it.
- **Reload** (`vllmctl reload`, `systemctl reload vllmd`) checks the whole file first and changes nothing if there is an
  error. A key marked *restart* ends a running model to take effect, or, in `[daemon]` and `[http]`, waits for a restart
  of vllmd.
"""

_INTRO: Final = {
    Section.DAEMON: "## [daemon]\n\nThe daemon itself.",
    Section.HTTP: "## [http]\n\nThe gateway and the status API over TCP.",
    Section.KEYS: "## [keys.NAME]\n\nAPI keys, one table each. `vllmctl key NAME` makes one, prints it once, and the table for "
    "this file. Clients send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
    Section.DEVICES: '## [devices."*"]\n\nThe budget of a device is its total less `reserve`, at most `limit`. In place '
    'of `*` an index (`[devices.0]`), a UUID (`[devices."GPU-..."]`) or `cpu` (the machine\'s memory, where there is no '
    "GPU); `*` is for all without a table of their own.",
    Section.MODELS: "## [models.NAME] and [defaults]\n\nOne table for each model; `[defaults]` takes the same keys for "
    "all.",
    Section.RESTART: "### restart\n\nA table in a model: `restart = { max_failures = 3 }`. A crash is any end of the "
    "engine that vllmd did not ask for.",
}

_EXAMPLES: Final = """## Examples

A secret (the file `/etc/vllmd/credentials/hf`, which only root needs to be able to read), for a gated model:

```toml
[models.gated]
model = "owner/gated-model"
vram = "9GiB"
env = { HF_TOKEN = "${credential:hf}" }
```

Two GPUs at once, and a model from a folder beside the file:

```toml
[models.large]
model = "./models/large"
gpus = 2
vram = "90%"
kv_cache = "8GiB"
restart = { max_failures = 3, window = "30m" }
```

Without a GPU the machine's memory is the device:

```toml
[devices.cpu]
reserve = "2GiB"

[models.tiny]
model = "Qwen/Qwen3-0.6B"
kv_cache = "1GiB"
max_model_len = 4096
```
"""


def page() -> str:
    """The text of docs/config.md."""
    parts = [_HEAD]
    for section in Section:
        parts += [_INTRO[section], _table(list(SECTIONS[section].values()))]
    parts.append(_owned())
    return "\n\n".join(part.strip() for part in (*parts, _EXAMPLES)) + "\n"


def _table(options: list[Option]) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    rows += [f"| `{o.key}` | {_cell(o.kind.expects)} | {_default(o)} | {_cell(_about(o))} |" for o in options]
    return "\n".join(rows)


def _about(option: Option) -> str:
    marks = (["*restart*"] if option.restarts else []) + (
        [f"*No effect in this version: {option.later}.*"] if option.later else []
    )
    return " ".join([option.doc, *marks])


def _default(option: Option) -> str:
    return _cell(f"{option.absent}") if option.default is None else f"`{_toml(option.default)}`"


def _toml(value: Any) -> str:
    return "{ }" if value == {} else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _owned() -> str:
    flags = [f"| `{flag}` | {why} |" for flag, why in OWNED_FLAGS.items()]
    names = [f"| `{name}` | {why} |" for name, why in OWNED_ENV.items()]
    return "\n".join(
        [
            "## Flags and variables that are vllmd's\n",
            "They are refused in `args` and `env`, abbreviations and `no-` included.",
            "\n| in `args` | |\n|---|---|",
            *flags,
            "\n| in `env` | |\n|---|---|",
            *names,
            "| `VLLMD_*` | names that begin so are vllmd's own |",
        ]
    )
