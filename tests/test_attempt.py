"""One attempt at its hardest moments: its end is always told, and no line of an engine can hold up or end the daemon."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.children import LIMIT
from vllmd import attempt as wiring
from vllmd import inquest
from vllmd.attempt import Attempt
from vllmd.core.cause import parse_rules
from vllmd.edge.journal import Lines
from vllmd.edge.probe import Probe
from vllmd.edge.rules import load_rules
from vllmd.edge.systemd import Notifier
from vllmd.edge.tasks import Tasks
from vllmd.events import Broken, Event, Gone, Progress, Spawn
from vllmd.facts import Launch, Phase
from vllmd.shared import Shared
from vllmd.spec import Cause, ModelSpec
from vllmd.transcript import Transcript
from vllmd.veil import Veil

RULES = parse_rules(load_rules())


class Journal:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, fields: dict[str, str | int]) -> bool:
        self.sent.append(str(fields["MESSAGE"]))
        return True


class Bench:
    """All that attempts need, and what they report."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.posted: asyncio.Queue[Event] = asyncio.Queue()
        self.said: list[str] = []
        self.attempts: list[Attempt] = []
        self.tasks = Tasks(lambda name, error: pytest.fail(f"{name}: {error!r}"))
        self.journal = Journal()
        (folder / "log").mkdir()
        (folder / "records").mkdir()
        self.shared = Shared(
            self.posted.put_nowait, self.tasks, Probe(), RULES, folder / "log", 1 << 20, 2, None, folder / "records",
            Lines(self.journal), Notifier(None), self.said.append,  # type: ignore[arg-type]
        )  # fmt: skip

    def attempt(self, code: str, **keys: Any) -> Attempt:
        """One whose engine is a line of Python; `argv` is another program."""
        argv = keys.pop("argv", (sys.executable, "-I", "-S", "-c", code))
        spec = ModelSpec("a", "/m", **keys)
        launch = Launch(
            argv,
            spec.env,
            f"unix:{self.folder}/a.sock",
            "a",
            str(self.folder / "scratch" / "a-1"),
            f"test-{uuid4().hex}:a:1",
        )
        self.attempts.append(Attempt(Spawn("a", 1, "a", launch), spec, self.shared))
        return self.attempts[-1]

    async def told(self, kind: type[Event], so: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next event of a kind."""
        async with asyncio.timeout(LIMIT):
            while True:
                event = await self.posted.get()
                if isinstance(event, kind) and so(event):
                    return event


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.tasks.end()
    for attempt in made.attempts:
        if not attempt.over:
            await attempt.end()


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ['{"a":' * 3200, "A" * 16_000 + "(", "Model loading took 1.2.3 GiB memory"])
async def test_a_crash_is_told_whatever_it_printed(bench: Bench, line: str) -> None:
    """Nested JSON, what regular expressions choke on, numbers that are none."""
    attempt = bench.attempt(f"import sys; print({line!r}); sys.exit(3)")
    attempt.start()
    await bench.told(Broken, lambda event: event.status == 3)
    await attempt.kill(crashed=True)
    gone = await bench.told(Gone)
    assert (gone.cause.kind, bench.said) == ("exited", [])


async def test_a_defect_in_the_judgement_costs_the_judgement_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone is told all the same, with what was seen from outside."""

    def diagnose(*_: object, **__: object) -> Cause:
        raise RecursionError("a line that nobody thought of")

    monkeypatch.setattr(inquest, "diagnose", diagnose)
    attempt = bench.attempt("import sys; sys.exit(3)")
    attempt.start()
    await bench.told(Broken)
    await attempt.kill(crashed=True)
    gone = await bench.told(Gone)
    assert gone.cause.kind == "crashed"
    assert "exited by itself with code 3" in gone.cause.text and "nobody thought of" in gone.cause.text


@pytest.mark.parametrize("part", ["find_cause", "transcript", "notifier"])
async def test_whatever_fails_once_the_tree_is_dead_it_is_told_as_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Else its memory would be kept for ever."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    attempt = bench.attempt("import sys; sys.exit(3)")
    attempt.start()
    await bench.told(Broken)
    match part:
        case "find_cause":
            monkeypatch.setattr(wiring, "find_cause", broken)
        case "transcript":
            monkeypatch.setattr(attempt.transcript, "keep", broken)
        case "notifier":
            monkeypatch.setattr(bench.shared.notifier, "drop", broken)
    await attempt.kill(crashed=True)
    assert (await bench.told(Gone)).pids_left == ()
    assert "a defect" in bench.said[0]


async def test_a_judgement_that_takes_long_is_given_up_and_holds_up_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in a thread: the loop goes on, and after LIMIT so does the end."""
    release = threading.Event()

    def diagnose(*_: object, **__: object) -> Cause:
        release.wait(LIMIT)
        return Cause("late", "late", "late")

    monkeypatch.setattr(inquest, "diagnose", diagnose)
    monkeypatch.setattr(inquest, "LIMIT", 0.2)
    attempt = bench.attempt("import sys; sys.exit(3)")
    attempt.start()
    await bench.told(Broken)
    end = bench.tasks.start(attempt.kill(crashed=True), "end")
    turns = 0
    while not end.done():
        await asyncio.sleep(0.01)
        turns += 1
    release.set()
    assert turns >= 10
    assert (await bench.told(Gone)).cause.text == "exited by itself with code 3; its log could not be read in time"


async def test_an_end_that_fails_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Gone the core tells it again; only when the tree is dead is it told as gone, and only once."""
    whole = wiring.kill_tree

    async def broken(*_: object, **__: object) -> tuple[int, ...]:
        raise RuntimeError("not now")

    attempt = bench.attempt("import signal; signal.pause()")
    attempt.start()
    await asyncio.sleep(0)
    monkeypatch.setattr(wiring, "kill_tree", broken)
    await attempt.kill(crashed=False)
    assert "not now" in bench.said[0]
    assert not any(isinstance(event, Gone) for event in bench.posted._queue)  # type: ignore[attr-defined]
    monkeypatch.setattr(wiring, "kill_tree", whole)
    await attempt.kill(crashed=False)
    await attempt.kill(crashed=False)
    assert sum(isinstance(event, Gone) for event in bench.posted._queue) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), ValueError("embedded null byte")])
async def test_a_spawn_that_fails_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Neither its scratch directory nor its cgroup; its cause says what to do."""

    def spawn(*_: object, **__: object) -> None:
        raise error

    bench.shared.begin = spawn
    bench.shared.cgroups = bench.folder / "cgroups"
    bench.shared.cgroups.mkdir()
    attempt = bench.attempt("")
    attempt.start()
    broken = await bench.told(Broken)
    assert broken.what.startswith("cannot run ")
    for path in (*bench.shared.cgroups.iterdir(), bench.folder / "scratch"):  # a real one has no files of its own
        for file in path.iterdir():
            file.unlink() if file.is_file() else None
    await attempt.kill(crashed=True)
    gone = await bench.told(Gone)
    assert (gone.cause.kind, gone.cause.heals) == ("cannot-run", False)
    assert "executable" in gone.cause.remedies[0].text
    assert list((bench.folder / "scratch").iterdir()) == []
    assert list(bench.shared.cgroups.iterdir()) == []


# -- the log ----------------------------------------------------------------------------------------------------------


async def test_a_line_that_we_cannot_cope_with_does_not_end_a_ready_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once, and the log is followed on."""
    whole = wiring.read_sign

    def read_sign(text: str) -> Any:
        if "odd" in text:
            raise ZeroDivisionError("odd")
        return whole(text)

    monkeypatch.setattr(wiring, "read_sign", read_sign)
    attempt = bench.attempt(
        "import sys, time\n"
        "for word in ('odd', 'odd', 'Starting to load model x', 'end'): print(word, flush=True); time.sleep(0.3)\n"
    )
    attempt.start()
    assert (await bench.told(Progress)).phase is Phase.LOAD
    assert (await bench.told(Broken)).what == "exited by itself with code 0"
    assert len(bench.said) == 1 and "ZeroDivisionError" in bench.said[0]
    await attempt.kill(crashed=False)


async def test_a_flood_is_bounded_and_holds_up_nobody(bench: Bench) -> None:
    """An engine that writes faster than it can be read, while it starts: the log stays small, the loop has its turns."""
    path = bench.folder / "log" / "a.log"
    stop = threading.Event()

    def flood() -> None:
        line = b"(EngineCore_DP0 pid=12) INFO 11-24 01:42:29 [core.py:1] " + b"x" * 140 + b"\n"
        with path.open("ab", buffering=0) as file:
            while not stop.is_set():
                file.write(line * 1000)
                time.sleep(0.01)  # 20 MB/s

    writer = threading.Thread(target=flood)
    transcript = Transcript("a", 1, bench.shared, Veil())
    path.touch()
    writer.start()
    try:
        longest, largest, before = 0.0, 0, time.monotonic()
        end = before + 3.0
        while before < end:
            transcript.read()
            await asyncio.sleep(transcript.pause(0.1))
            now = time.monotonic()
            longest, before = max(longest, now - before), now
            largest = max(largest, path.stat().st_size)
    finally:
        stop.set()
        writer.join()
    await transcript.finish()
    assert longest < 1.0
    assert largest < 16 << 20  # of sixty
    kept = sum(each.stat().st_size for each in path.parent.iterdir())
    assert kept < 3 * (16 << 20)
    assert any("bytes of output left out" in line for line in bench.journal.sent)


async def test_the_cause_is_found_although_the_log_was_just_rotated(bench: Bench) -> None:
    """The last words of a start are in NAME.log.1 then; the kept log has both parts."""
    bench.shared.log_size = 1000
    attempt = bench.attempt(
        "import sys, time\n"
        "print('CUDA out of memory', 'x' * 2000, flush=True); time.sleep(1); print('consequences', flush=True); sys.exit(1)"
    )
    attempt.start()
    await bench.told(Broken)
    await attempt.kill(crashed=True)
    assert (await bench.told(Gone)).cause.kind == "out-of-memory"
    log = bench.folder / "log"
    assert (log / "a.log").read_text() == "consequences\n"
    assert (log / "a.log.failed").read_text().splitlines()[1] == "consequences"


# -- secrets ----------------------------------------------------------------------------------------------------------


async def test_a_secret_of_its_environment_is_in_no_cause_and_no_journal(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the configuration put in, what has a secret's name, what it inherits; in any spelling."""
    monkeypatch.setenv("HF_TOKEN", "hf_inherited")
    bench.shared.secrets = frozenset({"a/substituted value", "short"})
    code = (
        "import os, sys\n"
        "print('401 Client Error: hf_inherited own-password short', repr(os.environ['ODD']))\n"
        "print('ValueError: https://me:pass@host/x?y=a%2Fsubstituted%20value')\nsys.exit(1)"
    )
    attempt = bench.attempt(code, env={"DB_PASS": "own-password", "ODD": "a/substituted value"})
    attempt.start()
    await bench.told(Broken)
    await attempt.kill(crashed=True)
    cause = (await bench.told(Gone)).cause
    assert cause.kind == "model-not-found"
    assert cause.detail == "401 Client Error: (hidden) (hidden) short '(hidden)'"
    assert bench.journal.sent == [cause.detail, "ValueError: https://(hidden)@host/x?y=(hidden)"]


def test_a_long_secret_is_not_left_in_part() -> None:
    """One that holds another goes whole, and each line of one with several."""
    veil = Veil(["secret-1", "secret-1-and-more", "first line\nsecond line", "tiny"])
    assert veil("secret-1-and-more secret-1 tiny") == "(hidden) (hidden) tiny"
    assert veil("x second line") == "x (hidden)"
    assert os.linesep not in veil("first line\nsecond line")
