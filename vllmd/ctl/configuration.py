"""`vllmctl validate`, `schema`, `reload`. The first two need no daemon: they run the installed vllmd's own code."""

from __future__ import annotations

import os
import subprocess
import sys

from vllmd.ctl.call import complain, print_json, print_lines
from vllmd.ctl.faults import BAD_CONFIG, FAILED, OK, Fault, Refused
from vllmd.ctl.look import spell
from vllmd.ctl.words import clean, listed, nested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from vllmd.ctl.call import Call


def program(module: str, *arguments: str) -> int:
    """Run a module of the vllmd that belongs to this vllmctl; its exit code."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    # -P: a folder called vllmd where we happen to stand is not it
    command = [sys.executable, "-P", "-m", module, *arguments]
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode
    return code if code >= 0 else FAILED


def validate(call: Call) -> int:
    """All problems of a file with their places; BAD_CONFIG if there are any. A running vllmd is asked about its own file:
    it knows the variables and credentials that are filled in there."""
    running = own_file(call)
    file = call.args.file or os.environ.get("VLLMD_CONFIG") or running
    if file and running and same(file, running) and (answer := ask(call, file)):
        return tell(call, running, answer)
    options = ["--json"] if call.args.json else []
    return program("vllmd.config.check", *options, *([file] if file else []))


def own_file(call: Call) -> str:
    """The configuration of the vllmd that answers; "" if none does."""
    try:
        status = call.client.call("GET", "/api/v1/status", timeout=2.0)
    except Fault:
        return ""
    return str(nested(status, "daemon").get("config") or "") if isinstance(status, dict) else ""


def same(one: str, two: str) -> bool:
    """Whether both paths name one file."""
    try:
        return os.path.samefile(one, two)  # noqa: PTH121
    except OSError:
        return False


def ask(call: Call, file: str) -> dict[str, Any] | None:
    """vllmd's verdict on the text of the file; None if it cannot have it, and the text is checked here."""
    try:
        with open(file, "rb") as source:  # noqa: PTH123
            text = source.read()
        text.decode()
        answer = call.client.call("POST", "/api/v1/validate", text, timeout=20.0)
    except (OSError, UnicodeDecodeError, Fault):
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("ok"), bool) else None


def tell(call: Call, file: str, answer: dict[str, Any]) -> int:
    """Print a verdict as `vllmd --check-config` does."""
    found, warnings = listed(answer, "problems"), answer.get("warnings")
    warnings = [clean(each) for each in warnings] if isinstance(warnings, list) else []
    if call.args.json:
        print_json({"ok": answer["ok"], "file": file, "problems": found, "warnings": warnings})
    elif answer["ok"]:
        mutter(f"warning: {each}" for each in warnings)
        print_lines([f"{clean(file)}: good, says the running vllmd"])
    else:
        mutter(clean(problem.get("text")) for problem in found)
        mutter([f"cannot use {clean(file)}: {counted(len(found), 'problem')}"])
    return OK if answer["ok"] else BAD_CONFIG


def mutter(lines: Iterable[str]) -> None:
    """Lines on standard error."""
    for line in lines:
        print(spell(line, sys.stderr), file=sys.stderr)


def schema(call: Call) -> int:
    """The JSON schema of the configuration."""
    return program("vllmd", "--print-schema")


def reload(call: Call) -> int:
    """Tell the daemon, and say what that means for each model; a broken file changes nothing."""
    try:
        answer = call.client.post("/api/v1/reload", {"dry_run": call.args.dry_run}, timeout=60.0)
    except Refused as refused:
        error = nested(refused.body, "error") if isinstance(refused.body, dict) else {}
        problems = nested(error, "data").get("problems")
        if refused.status not in (400, 422):
            raise
        found = [clean(problem) for problem in problems] if isinstance(problems, list) else []
        complain(refused.message, *(hint for hint in refused.hints if hint not in found))
        mutter(found)
        if call.args.json:
            print_json(refused.as_json())
        return BAD_CONFIG
    if call.args.json:
        print_json(answer)
        return OK
    said = answer if isinstance(answer, dict) else {}
    lines = plan_lines(nested(said, "data"))
    if call.args.dry_run:
        changes = [line for line in lines if not line.endswith(" unchanged") and not line.startswith("  warning:")]
        head = "would do:" if changes else "would change nothing"
    else:
        head = clean(said.get("message")) or "reloaded"
    print_lines([head, *lines])
    return OK


#: What a verdict of a reload means, as the end of a sentence that begins with the model.
VERDICTS = {"live": "changes live", "restart": "restarts", "add": "is added", "remove": "is removed"}


def plan_lines(plan: dict[str, object]) -> list[str]:
    """What happens to whom, of {"models": {"chat": "restart (vram)"}, "live": [keys]}; unchanged models are counted."""
    lines = []
    for what, whom in plan.items():
        if isinstance(whom, list) and what == "warnings":
            lines += [f"  warning: {clean(each)}" for each in whom]
        elif isinstance(whom, list) and whom:
            lines.append(f"  {VERDICTS.get(what, clean(what))}: {', '.join(map(clean, whom))}")
        elif isinstance(whom, dict):
            said = {clean(name): clean(verdict) for name, verdict in whom.items()}
            lines += [f"  {name}: {worded(verdict)}" for name, verdict in said.items() if verdict != "unchanged"]
            same = sum(verdict == "unchanged" for verdict in said.values())
            lines += [f"  {counted(same, clean(what).removesuffix('s'))} unchanged"] if same else []
    return lines


def worded(verdict: str) -> str:
    """ "restarts (vram, args)" of "restart (vram, args)", "changes live: restart" of "live (restart)"."""
    word, _, keys = verdict.partition(" (")
    if word == "live" and keys:
        return f"{VERDICTS[word]}: {keys.removesuffix(')')}"
    return VERDICTS.get(word, word) + (f" ({keys}" if keys else "")


def counted(number: int, what: str) -> str:
    """ "1 model", "2 models"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
