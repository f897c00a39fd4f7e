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


def vllmd(*arguments: str) -> int:
    """Run the vllmd that belongs to this vllmctl; its exit code."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    # -P: a folder called vllmd where we happen to stand is not it
    command = [sys.executable, "-P", "-m", "vllmd", *arguments]
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode
    return code if code >= 0 else FAILED


def validate(call: Call) -> int:
    """All problems of a file with their places; BAD_CONFIG if there are any."""
    check = f"--check-config={call.args.file}" if call.args.file else "--check-config"
    return vllmd(check, "--json") if call.args.json else vllmd(check)


def schema(call: Call) -> int:
    """The JSON schema of the configuration."""
    return vllmd("--print-schema")


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
        for problem in found:
            print(problem, file=sys.stderr)
        return BAD_CONFIG
    if call.args.json:
        print_json(answer)
        return OK
    said = answer if isinstance(answer, dict) else {}
    lines = [clean(said.get("message"))] if said.get("message") else []
    print_lines([*lines, *plan_lines(nested(said, "data"))] or ["reloaded"])
    return OK


def plan_lines(plan: dict[str, object]) -> list[str]:
    """What happens to whom, of {"models": {"chat": "restart (vram)"}, "live": [keys]}; unchanged models are counted."""
    lines = []
    for what, whom in plan.items():
        if isinstance(whom, list) and whom:
            lines.append(f"  {clean(what)}: {', '.join(map(clean, whom))}")
        elif isinstance(whom, dict):
            said = {clean(name): clean(verdict) for name, verdict in whom.items()}
            lines += [f"  {name}: {verdict}" for name, verdict in said.items() if verdict != "unchanged"]
            same = sum(verdict == "unchanged" for verdict in said.values())
            lines += [f"  {same} {clean(what)} unchanged"] if same else []
    return lines
