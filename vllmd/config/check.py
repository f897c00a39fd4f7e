"""`python -m vllmd.config.check [--json] [FILE]`: what vllmctl validates with where no vllmd runs. Exit code 78 for a file
that vllmd would refuse; what only a running vllmd can know is a warning."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllmd.config.load import Verdict, check, find_config
from vllmd.config.problems import Problem

EX_CONFIG = 78


def main(argv: Sequence[str]) -> int:
    """Check the file that is named, or the one that vllmd would read."""
    named = [word for word in argv if word != "--json"]
    path = (Path(named[0]) if named else find_config()).absolute()
    verdict = check(path)
    if "--json" in argv:
        sys.stdout.write(json.dumps(as_json(path, verdict), indent=2 if sys.stdout.isatty() else None) + "\n")
        return EX_CONFIG if verdict.problems else 0
    for warning in () if verdict.problems else verdict.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    for problem in verdict.problems:
        sys.stderr.write(f"{problem}\n")
    if verdict.problems:
        sys.stderr.write(f"cannot use {path}: {counted(len(verdict.problems), 'problem')}\n")
        return EX_CONFIG
    files = f" in {len(verdict.files)} files" if len(verdict.files) > 1 else ""
    sys.stdout.write(f"{path}: good, {counted(len(verdict.models), 'model')}{files}\n")
    return 0


def counted(number: int, what: str) -> str:
    """ "1 model", "2 models"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def as_json(path: Path, verdict: Verdict) -> dict[str, Any]:
    """The whole verdict."""
    return {
        "ok": not verdict.problems,
        "file": str(path),
        "models": list(verdict.models),
        "problems": [row(problem) for problem in verdict.problems],
        "warnings": [str(warning) for warning in verdict.warnings],
    }


def row(problem: Problem) -> dict[str, Any]:
    """One problem; `text` is all of it in one line."""
    return {
        "file": problem.file,
        "line": problem.line,
        "key": problem.key,
        "message": problem.message,
        "hint": problem.hint,
        "text": str(problem),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
