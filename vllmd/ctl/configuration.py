"""`vllmctl validate`, `schema`, `reload`. The first two ask the installed vllmd program itself: no daemon is needed."""

from __future__ import annotations

import os
import subprocess
import sys

from vllmd.ctl.call import complain, print_json, print_lines
from vllmd.ctl.faults import BAD_CONFIG, FAILED, OK, Refused
from vllmd.ctl.words import clean, nested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vllmd.ctl.call import Call


def vllmd(*arguments: str, capture: bool = False) -> tuple[int, list[str]]:
    """Run the vllmd that belongs to this vllmctl: (exit code, lines of output if captured)."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # -P: a folder called vllmd where we happen to stand is not it
    command = [sys.executable, "-P", "-m", "vllmd", *arguments]
    done = subprocess.run(command, env=environment, text=True, errors="replace", capture_output=capture, check=False)
    return done.returncode if done.returncode >= 0 else FAILED, f"{done.stdout or ''}{done.stderr or ''}".splitlines()


def validate(call: Call) -> int:
    """All problems of a file with their places; BAD_CONFIG if there are any."""
    sys.stdout.flush()
    named = [call.args.file] if call.args.file else []
    if not call.args.json:
        return vllmd("--check-config", *named)[0]
    code, lines = vllmd("--check-config", *named, capture=True)
    print_json({"ok": code == OK, "messages": lines})
    return code


def schema(call: Call) -> int:
    """The JSON schema of the configuration."""
    sys.stdout.flush()
    return vllmd("--print-schema")[0]


def reload(call: Call) -> int:
    """Tell the daemon, and say what that means for each model; a broken file changes nothing."""
    try:
        answer = call.client.post("/api/v1/reload", {"dry_run": call.args.dry_run}, timeout=60.0)
    except Refused as refused:
        error = nested(refused.body, "error") if isinstance(refused.body, dict) else {}
        problems = nested(error, "data").get("problems")
        if refused.status not in (400, 422):
            raise
        complain(refused.message, *refused.hints)
        for problem in problems if isinstance(problems, list) else []:
            print(clean(problem), file=sys.stderr)
        return BAD_CONFIG
    if call.args.json:
        print_json(answer)
        return OK
    said = answer if isinstance(answer, dict) else {}
    lines = [clean(said.get("message"))] if said.get("message") else []
    print_lines([*lines, *plan_lines(nested(said, "data"))] or ["reloaded"])
    return OK


def plan_lines(plan: dict[str, object]) -> list[str]:
    """What happens to whom: {"restart": ["chat"]} or {"models": {"chat": "restart"}}; nothing where nothing is said."""
    lines = []
    for what, whom in plan.items():
        if isinstance(whom, list) and whom:
            names = ", ".join(
                clean(each.get("name") or each.get("text")) if isinstance(each, dict) else clean(each) for each in whom
            )
            lines.append(f"  {clean(what)}: {names}")
        elif isinstance(whom, dict):
            lines += [f"  {clean(name)}: {clean(said)}" for name, said in whom.items()]
        elif whom not in (None, "", [], False):
            lines.append(f"  {clean(what)}: {clean(whom)}")
    return lines
