"""What is found out at an attempt's end: its cause, from its last words, where neither a slow disk nor a strange line holds
up anybody; and what may have run away from it."""

from collections.abc import Callable
from dataclasses import replace

from vllmd.core.cause import Rules, diagnose
from vllmd.edge.process import Child
from vllmd.edge.strays import doubtful
from vllmd.edge.tasks import in_thread
from vllmd.spec import Cause
from vllmd.transcript import Transcript
from vllmd.veil import Veil

LIMIT = 5.0  # seconds that the log may take to be read and judged
LOOK = 2.0  # seconds that a look through /proc may take


async def find_cause(
    transcript: Transcript | None, rules: Rules, veil: Veil,
    *, status: int | None, what: str, ready: bool, oom: int | None,
) -> Cause:  # fmt: skip
    """The cause, whatever happens: what the log does not tell in time, or not at all, the exit tells."""
    phase = transcript.phase if transcript else None

    def judge(lines: list[str]) -> Cause:
        return diagnose(lines, status=status, what=what, phase=phase, rules=rules, ready=ready, oom=oom)

    def look() -> Cause:
        return judge(transcript.last_words() if transcript else [])

    missing = "could not be read in time"
    cause: Cause | None = None
    try:
        cause = await in_thread(look, LIMIT, None)
    except Exception as error:
        missing = f"could not be judged: {error!r} (a defect of vllmd)"
    if cause is None:
        cause = Cause("crashed", f"{what or 'the engine ended'}; its log {missing}", "crashed", detail=what)
    return conceal(cause, veil)


def conceal(cause: Cause, veil: Veil) -> Cause:
    """The cause without what nobody must see."""
    remedies = tuple(replace(remedy, text=veil(remedy.text)) for remedy in cause.remedies)
    return replace(
        cause, text=veil(cause.text), short=veil(cause.short), detail=veil(cause.detail), remedies=remedies
    )  # fmt: skip


async def tell_runaways(child: Child, instance: str, complain: Callable[[str], None]) -> None:
    """Say which processes may still be of an engine that is ended, where that cannot be known."""
    nobody: tuple[int, ...] = ()
    if left := await in_thread(lambda: doubtful(child), LOOK, nobody):
        who = f"{instance} or of another model that still runs"
        complain(f"processes {', '.join(map(str, left))} ran away from {who}: they are ended with the last of these")
