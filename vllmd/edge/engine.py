"""A vLLM installation seen from outside: importing it takes 15-75 s, reading three of its sources a twentieth of one.

From the command to its environment (the interpreter in its first line, or the directory it lies in), from there to the
version in the distribution's metadata and the flags in the sources of `vllm serve`. What cannot be told is None, and
then nothing is refused for it.

Flags as vLLM's own parser takes them: "_" and "-" are the same up to the first ".", what follows a "." is a path into a
JSON value, and "no-" before a boolean turns it off. An unambiguous beginning is taken by the parser too; we ask for the
whole word, so that no flag of ours is given twice under two spellings.
"""

import ast
import difflib
import functools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from vllmd.facts import EngineFacts
from vllmd.spec import Cause, Remedy

#: An environment's packages, below its root.
SITES = (
    "lib/python3*/site-packages",
    "lib64/python3*/site-packages",
    "lib/python3*/dist-packages",
    "lib/python3/dist-packages",
)
#: Where `vllm serve` adds the flags of its HTTP server: since 0.32, and before.
FRONT = ("entrypoints/launchers/cli_args.py", "entrypoints/openai/cli_args.py")
#: The first lines of a script whose interpreter's path is too long for the kernel.
TRAMPOLINE = re.compile(r"#!/bin/sh\n'''exec' (?P<quote>\"?)(.+?)(?P=quote) ")
_parsing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Installation:
    """What is known of one vLLM. `package` is the directory of its sources, None when they were not found."""

    facts: EngineFacts
    package: Path | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether this is the CPU build, which calls itself so in its version."""
        return "cpu" in self.facts.version


def find_executable(name: str, command: str, env: Mapping[str, str]) -> Path | Cause:
    """The command as an absolute path: in PATH, or where it is written. A link is kept: it tells the environment."""
    if "/" not in command and not command.startswith("~"):
        found = shutil.which(command, path=env.get("PATH", os.defpath))
        if found:
            path = Path(found).absolute()
            return check_interpreter(name, path, env) or path
        return no_executable(name, f"{command} is not in PATH", f"models.{name}.executable = the full path of vllm")
    path = Path(os.path.expanduser(command)).absolute()  # noqa: PTH111 - a "~name" that is nobody stays as it is
    if path.is_dir():
        inner = path / "bin" / "vllm"
        hint = f'models.{name}.executable = "{inner}"' if inner.is_file() else "name the program, not its directory"
        return no_executable(name, f"{path} is a directory", hint)
    if not path.exists():
        return no_executable(name, f"{path} does not exist", "install vLLM there, or correct executable")
    if not os.access(path, os.X_OK):
        return no_executable(name, f"{path} is not executable", f"chmod +x {path}")
    return check_interpreter(name, path, env) or path


def no_executable(name: str, why: str, remedy: str) -> Cause:
    return Cause("no-executable", f"cannot start {name}: {why}", "vllm not found", (Remedy(remedy),), heals=False)


def check_interpreter(name: str, path: Path, env: Mapping[str, str]) -> Cause | None:
    """What a script's first line names and is not there: the kernel would say that the script itself is not. An environment
    that was moved, or whose Python was removed."""
    head = first_lines(path)
    if not head.startswith("#!"):
        return None
    line, words = TRAMPOLINE.match(head), head[2:].partition("\n")[0].split()
    program = line[2] if line else (words or [""])[0]
    if program.startswith("/") and not os.access(program, os.X_OK):
        why = "cannot be executed" if Path(program).exists() else "does not exist"
        return no_executable(
            name, f"{path} is run by {program}, which {why}", "install vLLM anew, or correct executable"
        )
    if Path(program).name == "env" and len(words) == 2 and not shutil.which(words[1], path=env.get("PATH", os.defpath)):
        return no_executable(
            name, f"{path} is run by {words[1]}, which is not in PATH", "install vLLM anew, or correct PATH"
        )
    return None


def read_installation(executable: Path) -> Installation:
    """The vLLM behind a command; without version and flags when it cannot be told."""
    for root in roots(executable):
        for site in (found for pattern in SITES for found in sorted(root.glob(pattern))):
            if package := package_in(site):
                return Installation(EngineFacts(str(executable), version(site), flags(package)), package)
    return Installation(EngineFacts(str(executable)))


def roots(executable: Path) -> Iterable[Path]:
    """Directories that may be the environment of a command, the likeliest first."""
    yield from dict.fromkeys(
        [p.parent.parent for p in (interpreter(executable), executable, executable.resolve()) if p is not None]
    )


def interpreter(executable: Path) -> Path | None:
    """The Python of a script's first line, or of its second where the first would have been too long for the kernel."""
    head = first_lines(executable)
    if match := TRAMPOLINE.match(head):
        return Path(match[2])
    match = re.match(r"#!\s*(\S*python\S*)", head)
    return Path(match[1]) if match else None


def first_lines(executable: Path) -> str:
    """The beginning of a command; "" when it cannot be read."""
    try:
        with executable.open("rb") as file:
            return file.read(1024).decode(errors="replace")
    except OSError:
        return ""


def package_in(site: Path) -> Path | None:
    """vLLM's sources in or behind a site-packages directory: a source tree may be installed by reference."""
    if (site / "vllm" / "engine").is_dir():
        return site / "vllm"
    for file in site.glob("vllm-*.dist-info/direct_url.json"):
        try:
            where = json.loads(file.read_bytes())
            source = Path(unquote(urlsplit(where["url"]).path)) / "vllm"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (source / "engine").is_dir():
            return source
    return None


def version(site: Path) -> str:
    """The version in the metadata of the distribution "vllm"; "" when there is none."""
    for file in sorted(site.glob("vllm-*.dist-info/METADATA")):
        try:
            head = file.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        except OSError:
            continue
        if match := re.search(r"^Version: *(\S+)", head, re.MULTILINE):
            return match[1]
    return ""


def flags(package: Path) -> frozenset[str] | None:
    """Long flags of `vllm serve` without dashes, or None when these sources are not of a kind that we know."""
    engine = package / "engine" / "arg_utils.py"
    front = next((package / name for name in FRONT if (package / name).is_file()), None)
    if front is None:
        return None
    try:
        return read_flags(stamp(engine), stamp(front))
    except (OSError, SyntaxError, ValueError):
        return None


Stamp = tuple[Path, int, int]


def stamp(path: Path) -> Stamp:
    """A file as it is now: path, time of change in nanoseconds, size. Raises OSError."""
    found = path.stat()
    return path, found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=16)
def read_flags(engine: Stamp, front: Stamp) -> frozenset[str] | None:
    """The flags of one installation; parsing takes 30-60 ms, so the answer is kept while the files are the same."""
    classes, server = named(parse(engine[0])), named(parse(front[0]))
    if "EngineArgs" not in classes or "FrontendArgs" not in server:
        return None
    found: set[str] = set()
    # Not the fields of EngineArgs: some have no flag, and some flags no field.
    for name in ("EngineArgs", "AsyncEngineArgs"):
        found |= added(classes[name]) if name in classes else set()
    # The server's flags are made from its fields in a loop.
    for name in ("BaseFrontendArgs", "FrontendArgs"):
        found |= annotated(server[name]) if name in server else set()
    found |= added(server["make_arg_parser"]) if "make_arg_parser" in server else set()
    return frozenset(found)


def parse(file: Path) -> ast.Module:
    """The source as a tree. One at a time: two threads that parse at once count each other's depth, and CPython up to 3.11
    and some 3.12 answer with SystemError. Raises OSError, SyntaxError, ValueError."""
    source = file.read_bytes()
    with _parsing:
        return ast.parse(source)


def named(tree: ast.Module) -> dict[str, ast.AST]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def added(tree: ast.AST) -> set[str]:
    """Long names given to add_argument() anywhere below `tree`."""
    return {
        arg.value.removeprefix("--")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        for arg in node.args
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str) and arg.value.startswith("--")
    }


def annotated(tree: ast.AST) -> set[str]:
    """Names of a class's annotated fields, spelled as flags."""
    return {
        node.target.id.replace("_", "-")
        for node in getattr(tree, "body", [])
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    }


def check_flags(name: str, args: Mapping[str, Any], known: frozenset[str], version: str) -> Cause | None:
    """The first flag of `args` that this vLLM would not take, with the nearest that it would."""
    for key, value in args.items():
        flag = key.lstrip("-").partition("=")[0].partition(".")[0].rstrip("+").replace("_", "-")
        word = f"no-{flag}" if value is False else flag
        if word in known or (word.startswith("no-") and word[3:] in known):
            continue
        longer = sorted(f for f in known if f.startswith(flag))
        near = longer[:2] or difflib.get_close_matches(flag, known, n=1)
        why = f"is short for --{longer[0]}: write it in full" if len(longer) == 1 else "is not a flag of vLLM"
        said = f" {version}" if version and len(longer) != 1 else ""
        hint = f"write {' or '.join(near)}" if near else f"remove {key} from models.{name}.args"
        return Cause(
            "unknown-flag",
            f"cannot start {name}: args.{key} {why}{said}" + (f" (did you mean {near[0]}?)" if near and said else ""),
            f"unknown flag {flag}" if len(flag) <= 11 else "unknown flag",
            (Remedy(hint),),
            heals=False,
            detail=f"--{word}",
        )
    return None


def knows_config(package: Path, model_type: str) -> bool | None:
    """Whether vLLM or its transformers can read a configuration of this type without code from the model's repository.

    None when neither's table could be read.
    """
    files = (
        package / "transformers_utils" / "config.py",
        package.parent / "transformers" / "models" / "auto" / "auto_mappings.py",
        package.parent / "transformers" / "models" / "auto" / "configuration_auto.py",
    )
    tables = [words(stamp(file)) for file in files if file.is_file()]
    if len(tables) < 2:
        return None
    return any(model_type in table for table in tables)


@functools.lru_cache(maxsize=32)
def words(file: Stamp) -> frozenset[str]:
    """Every string and keyword of a source file: tables are written as one or the other. Too much errs to "known"."""
    try:
        tree = parse(file[0])
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(found | {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg})
