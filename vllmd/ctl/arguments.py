"""The command line: one table of commands. Parser, help and completions are made from it.

Only the parser of the command at hand is built.
"""

from __future__ import annotations

import argparse
import sys

from vllmd import __version__
from vllmd.ctl.faults import EXIT_CODES, Usage
from vllmd.ctl.words import seconds_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Options = dict[str, dict[str, Any]]


class Command:
    """`run` is "module:function" in vllmd.ctl; `operand` "" | MODEL | MODELS | FILE | SHELL, "?" = may be left out."""

    __slots__ = ("examples", "operand", "options", "run", "summary")

    def __init__(self, run: str, summary: str, operand: str = "", options: Options | None = None, examples: str = ""):
        self.run = run
        self.summary = summary
        self.operand = operand
        self.options = options or {}
        self.examples = examples


def duration(text: str) -> float:
    """Seconds, for argparse."""
    try:
        return seconds_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """A number of lines, for argparse."""
    if not (text.isascii() and text.isdigit()) or len(text) > 6:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of lines (0 to 999999)')
    return int(text)


def event_id(text: str) -> str:
    """The id of an event, for argparse."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f'"{text}" is not an event id')
    return text


SWITCH = "store_true"
GLOBAL: Options = {
    "--socket": {
        "metavar": "PATH",
        "help": "where vllmd listens (also VLLMD_SOCKET; else /run/vllmd.sock, or your own)",
    },
    "--json": {"action": SWITCH, "help": "print JSON, sizes in bytes, times in seconds"},
    "--color": {
        "choices": ("auto", "always", "never"),
        "default": "auto",
        "help": "tint the text (auto: on a terminal)",
    },
}
CHOICE: Options = {
    "--category,-c": {"metavar": "NAME", "help": "all models of this category, such as ocr"},
    "--all,-a": {"action": SWITCH, "help": "all configured models"},
}
WAIT: Options = {
    "--no-wait": {"action": SWITCH, "help": "return as soon as vllmd has accepted"},
    "--timeout": {"metavar": "TIME", "type": duration, "help": 'wait no longer than this ("90s", "10m"); exit code 6'},
}
NOW: Options = {"--now": {"action": SWITCH, "help": "do not let running requests finish"}}
LEND: Options = {
    "--for": {"metavar": "TIME", "type": duration, "dest": "seconds", "help": 'for so long, such as "2h"'},
    "--device": {"metavar": "DEVICE", "help": "an index or UUID (the one where the least must go)"},
    "--end": {"action": SWITCH, "help": "take all back now"},
}

COMMANDS: dict[str, Command] = {
    "status": Command(
        "status:run",
        "show devices, models and what is wrong",
        options={
            "--watch,-w": {"action": SWITCH, "help": "keep it on the screen, with keys to start, stop, look"},
            "--all,-a": {"action": SWITCH, "help": "never fold stopped models into one line"},
            "--readonly": {"action": SWITCH, "help": "with --watch: no keys that change things"},
        },
        examples="vllmctl status --watch\nvllmctl status --json | jq '.models[] | {name, state}'",
    ),
    "start": Command(
        "wait:run", "start models and wait until they are ready", "MODELS", CHOICE | WAIT,
        "vllmctl start dots-ocr\nvllmctl start --category ocr --no-wait",
    ),
    "stop": Command(
        "wait:run", "let running requests finish, then stop", "MODELS", CHOICE | NOW | WAIT,
        "vllmctl stop dots-ocr\nvllmctl stop --all --now",
    ),
    "restart": Command(
        "wait:run", "stop and start; starts what is not up", "MODELS", CHOICE | NOW | WAIT, "vllmctl restart dots-ocr"
    ),
    "logs": Command(
        "logs:run",
        "print what a model's vLLM wrote",
        "MODEL",
        {
            "--follow,-f": {"action": SWITCH, "help": "and go on printing"},
            "--lines,-n": {"metavar": "N", "type": count, "default": 200, "help": "the last N lines (200)"},
            "--since": {"metavar": "TIME", "type": duration, "help": 'no older than this, such as "10m"'},
            "--failed": {"action": SWITCH, "help": "of the last start that failed"},
            "--previous": {"action": SWITCH, "help": "of the start before the present one"},
        },
        "vllmctl logs -f dots-ocr\nvllmctl logs --failed dots-ocr",
    ),
    "why": Command("details:why", "say why a model is not ready, and what to do", "MODEL"),
    "show": Command("details:show", "show all that is known of a model: settings, command line, files", "MODEL"),
    "plan": Command("details:plan", "show who fits with whom and with which flags; starts nothing", "MODELS?"),
    "devices": Command("details:devices", "show who has the memory of each device"),
    "lend": Command(
        "lend:run",
        "free memory for something else, and get it back later",
        "SIZE?",
        LEND | WAIT,
        "vllmctl lend 6GiB --for 2h\nvllmctl lend --end",
    ),
    "swap-test": Command(
        "swaptest:run", "put a model to sleep and wake it 5 times; its sleep is used only after that", "MODEL", WAIT,
        "vllmctl swap-test dots-ocr",
    ),
    "sleep": Command("swaptest:rest", "have a model give its memory back and keep its processes", "MODEL", WAIT),
    "wake": Command("swaptest:wake", "wake a model that sleeps", "MODEL", WAIT),
    "key": Command(
        "key:run", "make an API key; needs no daemon", "NAME",
        {
            "--scope": {"action": "append", "choices": ("infer", "read", "admin"), "help": "what it is good for (infer)"},
            "--model": {"action": "append", "metavar": "MODEL", "help": "a model that it may ask (all)"},
        },
        "vllmctl key alice\nvllmctl key monitor --scope read",
    ),
    "validate": Command(
        "configuration:validate", "check a configuration file; needs no daemon", "FILE?",
        examples="vllmctl validate /etc/vllmd/vllmd.toml",
    ),
    "schema": Command("configuration:schema", "print the JSON schema of the configuration; needs no daemon"),
    "reload": Command(
        "configuration:reload",
        "read the configuration again; restarts only what must be",
        options={"--dry-run": {"action": SWITCH, "help": "only say what would happen to each model"}},
    ),
    "events": Command(
        "logs:events",
        "print what happens, as it happens",
        options={"--since-id": {"metavar": "ID", "type": event_id, "help": "begin after this event (its `id`)"}},
    ),
    "completion": Command(
        "completion:run", "print a completion script for bash, zsh or fish", "SHELL",
        examples="source <(vllmctl completion bash)\nvllmctl completion fish > ~/.config/fish/completions/vllmctl.fish",
    ),
    "version": Command("status:version", "print the versions of vllmctl and vllmd"),
    # for the completion scripts, which ask while somebody types
    "_models": Command("completion:models", ""),
    "_categories": Command("completion:categories", ""),
}  # fmt: skip

#: The predecessor's spellings.
OLD = {
    "--status": ["status"],
    "--launch-ocr": ["start", "--category", "ocr"],
    "--launch-vlm": ["start", "--category", "vlm"],
    "--stop-all": ["stop", "--all"],
}
NARGS: dict[str, dict[str, Any]] = {
    "MODEL": {"dest": "model", "metavar": "MODEL"},
    "MODELS": {"dest": "models", "metavar": "MODEL", "nargs": "*"},
    "MODELS?": {"dest": "models", "metavar": "MODEL", "nargs": "*"},
    "NAME": {"dest": "name", "metavar": "NAME"},
    "SIZE?": {"dest": "size", "metavar": "SIZE", "nargs": "?"},
    "FILE?": {"dest": "file", "metavar": "FILE", "nargs": "?"},
    "SHELL": {"dest": "shell", "choices": ("bash", "zsh", "fish")},
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are faults as all others."""

    def error(self, message: str) -> NoReturn:
        """Say how it is used. Raises Usage."""
        self.print_usage(sys.stderr)
        raise Usage(f"cannot run: {message}", f"{self.prog} --help")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; `command` is a key of COMMANDS. Raises Usage; exits with 0 after help or version."""
    at = _command_at(argv)
    if at is None:
        if "--version" in argv:
            print(f"vllmctl {__version__}")
            raise SystemExit(0)
        if not argv or "-h" in argv or "--help" in argv:
            print(overview())
            raise SystemExit(0 if argv else 2)
        raise Usage("cannot run: no command given", "vllmctl --help")
    word = argv[at]
    named = OLD.get(word, [word])
    if named == ["help"]:
        return parse([*argv[at + 1 :], "--help"])
    if named[0] not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(word, visible(), 1, 0.7)
        raise Usage(f'cannot run: no command "{word}"', f"vllmctl {near[0]}" if near else "vllmctl --help")
    args = build(named[0]).parse_args([*argv[:at], *named[1:], *argv[at + 1 :]])
    args.command = named[0]
    return args


def build(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with the global options: they may stand before or after it."""
    command = COMMANDS[name]
    examples = "".join(f"\n  {line}" for line in command.examples.splitlines())
    parser = Parser(
        prog=f"vllmctl {name}",
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        epilog=f"examples:{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if command.operand:
        kind = dict(NARGS[command.operand])
        parser.add_argument(kind.pop("dest"), **kind)
    for flags, options in (command.options | GLOBAL).items():
        parser.add_argument(*reversed(flags.split(",")), **options)
    return parser


def visible() -> dict[str, Command]:
    """The commands for people."""
    return {name: command for name, command in COMMANDS.items() if command.summary}


def overview() -> str:
    """The text of `vllmctl --help`."""
    lines = [
        "usage: vllmctl [--socket PATH] [--json] [--color WHEN] COMMAND ...",
        "",
        "Ask and tell vllmd.",
        "",
        "commands:",
    ]
    for name, command in visible().items():
        operand = (
            command.operand.replace("MODELS?", "[MODEL...]")
            .replace("MODELS", "MODEL...")
            .replace("FILE?", "[FILE]")
            .replace("SIZE?", "[SIZE]")
        )
        lines.append(f"  {f'{name} {operand}'.rstrip():<21} {command.summary}")
    lines += ["", "options of every command:"]
    for flag, options in GLOBAL.items():
        value = options.get("metavar") or "|".join(options.get("choices", ()))
        lines.append(f"  {f'{flag} {value}'.rstrip():<27} {options['help']}")
    lines += ["", "exit codes:"]
    lines += [f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()]
    lines += ["", "examples:", "  vllmctl status --watch", "  vllmctl start --category ocr", "  vllmctl why dots-ocr"]
    return "\n".join([*lines, "", "More of one command: vllmctl COMMAND --help"])


def _command_at(argv: list[str]) -> int | None:
    """Where the command stands: the first word that is no option, nor the value of one."""
    skip = False
    for at, word in enumerate(argv):
        if skip:
            skip = False
        elif word in OLD or not word.startswith("-"):
            return at
        else:
            skip = word in ("--socket", "--color")
    return None
