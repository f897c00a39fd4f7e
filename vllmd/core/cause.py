"""Why an engine ended, from the words it left. One failure prints up to three tracebacks; the cause is in the first.

The rules (vllmd/data/rules.toml) are data: a pattern, what it means, what to do. The first line that a rule knows wins,
since what comes after are consequences; rules marked as endings ("Engine core initialization failed") count only where
nothing better is found, not even an exception that no rule knows.
"""

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllmd.core.logline import LogLine, parse
from vllmd.core.words import PHASES
from vllmd.facts import Phase
from vllmd.spec import Cause, Remedy
from vllmd.units import gib

LONGEST = 400  # characters of an exception that are shown
BEFORE = 60  # lines before the first fatal sign of a running engine that may hold its cause
LAST = 60  # lines looked at where a running engine gave no such sign

_TRACE = "Traceback (most recent call last):"
_QUOTED = ("    ", '  File "')  # lines of a traceback that quote the program, not its words
_EXCEPTION = re.compile(r"(?:\w+\.)*(\w+)(: .*)?")  # a class has a capital in its name
_DULL = re.compile(r"(?:SystemExit|KeyboardInterrupt|CancelledError)\b")
_FATAL = re.compile(
    r"EngineCore encountered an? (?:fatal error|issue)|EngineDeadError|Worker proc \S+ died|WorkerProc hit an exception"
    r"|^Fatal Python error|^terminate called"
)
#: Kinds of causes that no rule found: what the exit alone tells, or an exception that nobody knows.
VAGUE = frozenset({"crashed", "engine-died", "killed", "exited", "cannot-run"})
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the rules file. `text`, `short` and `remedies` may name the pattern's groups in braces; a remedy whose
    group did not match is left out."""

    kind: str
    pattern: re.Pattern[str]
    short: str
    text: str
    remedies: tuple[str, ...] = ()
    heals_starting: bool = False
    heals_running: bool = False
    ending: bool = False  # says that something failed, not what
    warning: bool = False  # may stand in a WARNING


@dataclass(frozen=True, slots=True)
class Rules:
    """A rules file. `version` grows when its rows do."""

    version: int
    rows: tuple[Rule, ...]


def parse_rules(raw: Mapping[str, Any]) -> Rules:
    """The parsed file as rules, in its order. Raises ValueError that names the row and what is wrong with it."""
    return Rules(int(raw["version"]), tuple(_rule(row) for row in raw["rule"]))


def diagnose(
    lines: Sequence[str],
    *,
    status: int | None,
    what: str,
    phase: Phase | None,
    rules: Rules,
    ready: bool = False,
    oom: int | None = None,
) -> Cause:
    """The cause of an end that nobody asked for. Always finds one.

    `status` is the leader's exit code (negative: signal; None: it runs, another process died), `what` happened as a
    sentence part, `phase` the last of the start. `ready`: it had served; only its last words count then. `oom`: the kernel
    killed in its cgroup for lack of memory, when that held this many bytes.
    """
    if oom is not None:
        return _out_of_memory(oom, what, phase, ready)
    if not lines and what.startswith("cannot "):  # it never ran
        return _never_ran(status, what)
    if status is not None and -status in _FROM_OUTSIDE:
        return _ended(status, what, phase, ready)
    said = [parse(line) for line in lines]
    if ready:
        said = _last_words(said)
    serious = [line for line in said if line.level in ("", "ERROR", "CRITICAL") and not line.text.startswith(_QUOTED)]
    found = _first(serious, [rule for rule in rules.rows if not rule.ending])
    found = found or _first(said, [rule for rule in rules.rows if rule.warning])
    if found is None:
        endings = [rule for rule in rules.rows if rule.ending]
        root = next((text for text in _exceptions(said) if not any(r.pattern.search(text) for r in endings)), None)
        if root is not None:
            text = f"crashed{_during(phase, ready)}: {root}"
            return Cause("crashed", text, "crashed", detail=root, phase=_name(phase, ready))
        found = _first(serious, endings)
    if found is None:
        return _ended(status, what, phase, ready)
    return _by_rule(*found, what, phase, ready)


def _out_of_memory(held: int, what: str, phase: Phase | None, ready: bool) -> Cause:
    text = f"the kernel killed it{_during(phase, ready)} for lack of host memory (it held {gib(held)})"
    remedies = (Remedy("free host memory, or raise MemoryMax= of vllmd.service or memory_max of the model"),)
    return Cause("host-oom", text, "out of host memory", remedies, detail=what, phase=_name(phase, ready))


def _never_ran(status: int | None, what: str) -> Cause:
    """As a shell counts: 127 there is nothing that could be run, 126 it could not be run just now."""
    program = Remedy("correct `executable`, or install vLLM there anew: the file or the interpreter in its first line")
    machine = Remedy("look whether processes, memory or open files have run out: TasksMax=, LimitNOFILE=")
    passing = status == 126
    return Cause("cannot-run", what, "cannot run", (machine if passing else program,), heals=passing, detail=what)


def _rule(row: Mapping[str, Any]) -> Rule:
    kind = str(row.get("kind", "?"))
    try:
        pattern = re.compile(row["pattern"])
        heals = row.get("heals", False)
        rule = Rule(
            kind, pattern, row["short"], row["text"], tuple(row.get("remedies", ())), heals is True,
            heals in (True, "running"), row.get("ending", False), row.get("warning", False),
        )  # fmt: skip
        for template in (rule.short, rule.text, *rule.remedies):
            template.format_map(dict.fromkeys(["what", *pattern.groupindex], ""))
    except re.error as error:
        raise ValueError(f"cannot use rule {kind}: its pattern is wrong ({error})") from None
    except KeyError as error:
        raise ValueError(f"cannot use rule {kind}: {error} is neither a key of it nor a group of its pattern") from None
    return rule


def _first(said: Sequence[LogLine], rows: Sequence[Rule]) -> tuple[Rule, re.Match[str]] | None:
    """The first line that a rule knows, and the first rule that knows it."""
    for line in said:
        for rule in rows:
            if match := rule.pattern.search(line.text):
                return rule, match
    return None


def _by_rule(rule: Rule, match: re.Match[str], what: str, phase: Phase | None, ready: bool) -> Cause:
    groups = {"what": what or "the engine ended", **match.groupdict()}
    known = {name: value for name, value in groups.items() if value is not None}
    remedies = tuple(
        Remedy(text.format_map(known)) for text in rule.remedies
        if all(groups[name] is not None for name in groups if f"{{{name}}}" in text)
    )  # fmt: skip
    filled = {name: value or "?" for name, value in groups.items()}
    return Cause(
        rule.kind, rule.text.format_map(filled), rule.short.format_map(filled), remedies,
        rule.heals_running if ready else rule.heals_starting, _shorten(match.string.strip()), _name(phase, ready),
    )  # fmt: skip


def _ended(status: int | None, what: str, phase: Phase | None, ready: bool) -> Cause:
    """What the exit alone tells."""
    during, name = _during(phase, ready), _name(phase, ready)
    look = Remedy("journalctl -k shows whether the kernel killed it for lack of memory")
    if status is None:
        text = f"{what}{during}; its log does not say why, so perhaps it was killed"
        return Cause("engine-died", text, "engine process died", (look,), detail=what, phase=name)
    if status < 0:
        number = -status
        called = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if number == signal.SIGKILL:
            text = f"killed by SIGKILL from outside{during}, perhaps by the kernel for lack of memory"
            return Cause("killed", text, "killed (SIGKILL)", (look,), detail=what, phase=name)
        if number in _FROM_OUTSIDE:
            text = f"ended by {called} from outside{during}"
            return Cause("killed", text, f"ended by {called}", detail=what, phase=name)
        return Cause("crashed", f"crashed with {called}{during}", f"crashed ({called})", detail=what, phase=name)
    text = f"exited by itself with code {status}{during}"
    return Cause("exited", text, f"exited with code {status}", detail=what, phase=name)


def _last_words(said: Sequence[LogLine]) -> list[LogLine]:
    """Where the end of a running engine begins: a day of requests and their errors lies before it."""
    fatal = next((at for at, line in enumerate(said) if _FATAL.search(line.text) and line.level != "INFO"), None)
    return list(said[-LAST:] if fatal is None else said[max(0, fatal - BEFORE) :])


def _exceptions(said: Sequence[LogLine]) -> Iterator[str]:
    """The last lines of the tracebacks, in order; each process's lines are read for themselves, as they interleave."""
    inside: dict[str, bool] = {}
    for at, line in enumerate(said):
        if line.text.startswith(_TRACE):
            inside[line.process] = True
        elif inside.get(line.process) and line.text.strip() and not line.text.startswith(" "):
            inside[line.process] = False
            match = _EXCEPTION.fullmatch(line.text.strip())
            if match and match[1].lower() != match[1] and not _DULL.match(match[1]):
                yield _shorten(match[1] + (match[2] or "") + _more(said, at))


def _more(said: Sequence[LogLine], at: int) -> str:
    """pydantic says what is wrong in the next line."""
    if at + 1 < len(said) and re.search(r"\d+ validation errors? for ", said[at].text):
        return ": " + said[at + 1].text.strip().removeprefix("Value error, ").partition(" [type=")[0]
    return ""


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _during(phase: Phase | None, ready: bool) -> str:
    return "" if ready else f" while {PHASES[phase][0]}"


def _name(phase: Phase | None, ready: bool) -> str:
    return "" if ready or phase is None else phase.value
