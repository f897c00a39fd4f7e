"""Faults put into the core on purpose, one line each: every one must make the core's own tests fail.

A fault that nobody notices is a rule that nobody tests. Each is applied to a copy of the package.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ("test_core.py", "test_core_demand.py", "test_core_loans.py", "test_core_sleep.py", "test_core_waiting.py",
         "test_core_memory.py",
         "test_core_demand_property.py", "test_core_property.py")  # fmt: skip
LIMIT = 100.0  # seconds; a core that loops for ever is found too


class Fault(NamedTuple):
    """In `file` of vllmd/core, `old` becomes `new`."""

    file: str
    old: str
    new: str


FAULTS = {
    "an answer is dropped": Fault(
        "starts.py", "world.answer(inst, 202, f\"{inst.id}: starting\")",
        "inst.tickets.clear()",
    ),
    "a caller is answered twice": Fault(
        "world.py", "tickets, inst.tickets = inst.tickets, []",
        "tickets = inst.tickets",
    ),
    "the stall has no deadline": Fault(
        "starts.py", "inst.deadline = now + inst.spec.start_stall\n    world.emit",
        "world.emit",
    ),
    "a sign of life does not count": Fault(
        "starts.py", "inst.heard = now\n        inst.deadline = now + inst.spec.start_stall",
        "inst.heard = now",
    ),
    "the kill is skipped": Fault("stops.py", "world.emit(KillTree(inst.id, inst.attempt, crashed))", "pass"),
    "a lost kill is not repeated": Fault(
        "core.py", "world.emit(KillTree(inst.id, inst.attempt, inst.crashed))",
        "pass",
    ),
    "late reports are heard": Fault(
        "core.py", "if inst is not None and inst.attempt == event.attempt:",
        "if inst is not None:",
    ),
    "memory is released at the kill": Fault(
        "stops.py", "inst.measuring = False\n    inst.gone = False",
        "inst.measuring = False\n    inst.gone = False\n    world.ledger.release(inst.id)",
    ),
    "nobody waits for the memory": Fault("stops.py", "if settled(world, inst):", "if True:"),
    "memory that is gone is waited for without end": Fault(
        "stops.py", "inst.deadline = now + SETTLE_LIMIT",
        "inst.deadline = None",
    ),
    "others' memory does not count": Fault(
        "ledger.py", "self.reading.total - self.reserve - self.external - self.lent - taken",
        "self.reading.total - self.reserve - self.lent - taken",
    ),
    "the limit does not count": Fault("ledger.py", "budget = min(budget, rule.limit)", "pass"),
    "promises are not kept": Fault(
        "ledger.py", "left\")\n        self.held[instance] = dict(parts)",
        "left\")",
    ),
    "the measuring window never opens": Fault(
        "starts.py", "inst.measuring = False\n        world.dirty",
        "world.dirty",
    ),
    "the measuring window excludes nobody": Fault(
        "placing.py", "kinds = (moves.measuring, moves.moving) if measures else (moves.measuring,)",
        "return frozenset()",
    ),
    "a drain disturbs who measures": Fault("stops.py", "if inst.drain_held and not world.closing:", "if False:"),
    "the backoff does not grow": Fault("policy.py", "rule.backoff * 2.0 ** min(failures - 1, 32)", "rule.backoff"),
    "the backoff has no end": Fault("policy.py", ", rule.backoff_max)", ", 1e9)"),
    "what cannot heal is retried": Fault("stops.py", "elif not cause.heals:", "elif False:"),
    "it never gives up": Fault("failing.py", "if len(inst.failures) >= rule.max_failures:", "if False:"),
    "old failures count for ever": Fault("policy.py", "if now - at < rule.window]", "]"),
    "health forgives nothing": Fault("health.py", "inst.failures.clear()", "pass"),
    "exit 0 is no crash": Fault(
        "stops.py", "inst.crashed, inst.broke_at = True, now\n            end(world, inst, now, event.what, crashed=True)",
        "inst.broke_at = now\n            end(world, inst, now, event.what, crashed=event.status != 0)",
    ),
    "the drain has no limit": Fault(
        "stops.py", "inst.deadline = now + inst.spec.drain + inst.spec.stop_timeout",
        "inst.deadline = now + 1e9",
    ),
    "no test request is sent": Fault("health.py", "world.emit(Canary(inst.id, inst.attempt))", "pass"),
    "a frozen engine is never called hung": Fault(
        "policy.py", "return max(proved + hang_after, asked + hang_after / 2)\n",
        "return 1e9\n",
    ),
    "tokens prove nothing": Fault("health.py", "elif event.moved:", "elif False:"),
    "a stop does not end the wish": Fault("stops.py", "inst.wanted = inst.insisted = ", "inst.insisted = "),
    "a second start is another attempt": Fault(
        "wishes.py", "case State.STOPPED | State.FAILED | State.BACKOFF:\n                again",
        "case State.STOPPED | State.FAILED | State.BACKOFF | State.STARTING:\n                again",
    ),
    "a shutdown is never over": Fault("core.py", "world.emit(Finish())", "pass"),
    "a removed model stays": Fault("core.py", "world.emit(Forget(inst.id))", "pass"),
    "a reload restarts all": Fault(
        "reload.py", "elif inst.spec.name in event.restart:",
        "elif True:",
    ),
    "who slept blames the others": Fault("core.py", "health.overslept(world, now - world.now)", "pass"),
    "nobody is asked before he is called hung": Fault(
        "health.py", "if hung is None or now < hung:",
        "if hung is not None and now < hung:",
    ),
    "the line gives up": Fault("starts.py", "if moves_only or inst.patient:", "if inst.patient:"),
    "a patient start gives up": Fault("starts.py", "if moves_only or inst.patient:", "if moves_only:"),
    "a silent device fails its model": Fault(
        "starts.py", "case Cause() if outcome.heals and (inst.patient or inst.accepted):",
        "case Cause() if False:",
    ),
    "slow files fail their model": Fault(
        "starts.py", 'refuse(world, inst, Cause("inspect-slow"',
        'give_up(world, inst, Cause("inspect-slow"',
    ),
    "a removed model starts again": Fault(
        "wishes.py", "if spec is None:\n            world.tell",
        "if False:\n            world.tell",
    ),
    "a model that comes back swaps its process's configuration": Fault(
        "reload.py", "elif inst.spec.name not in old.models:",
        "elif False:",
    ),
    "attempts are numbered anew": Fault(
        "world.py", "max(self.attempts.get(inst.id, 0), inst.attempt) + 1",
        "inst.attempt + 1",
    ),
    "a start asked for during the end is forgotten": Fault("stops.py", "elif inst.insisted:", "elif False:"),
    "memory on its way back counts twice": Fault("ledger.py", "self._returning(reading) if self.leaving else {}", "{}"),
    "other programs' growth is a leak": Fault("ledger.py", "- growth(before[reading.id], reading)", ""),
    "an idle run makes a model smaller": Fault("usage.py", "base = max(base, known.base) if known else base", "pass"),
    "what exceeds a given vram is learned": Fault(
        "usage.py", "if inst.spec.vram is not None else {}\n    base",
        "if False else {}\n    base",
    ),
    "an overrun restarts without end": Fault(
        "stops.py", "if inst.crashed or own_end:",
        "if inst.crashed:",
    ),
    "a stop at once disturbs who measures": Fault(
        "stops.py", "[] if world.closing or inst.hurried else",
        "[] if True else",
    ),
    "who was disturbed keeps what it took": Fault(
        "usage.py", "if inst.disturbed and not inst.remeasured:",
        "if False:",
    ),
    "the window does not count for the place": Fault("placing.py", "3 if not outcome.busy else 2", "3"),
    "small models fill the large card": Fault("placing.py", "-max(map(size_class, outcome.devices))", "0"),
    "a mixed set is reserved the same on each card": Fault(
        "placing.py", "need, parts = on_each(need, devices)",
        "parts = dict.fromkeys((d.id for d in devices), need.total)",
    ),
    "a card takes two shards": Fault("candidates.py", "if hit in chosen:", "if False:"),
    "a table of one device hides that of all": Fault(
        "ledger.py", "(reading.id, str(reading.index), \"*\") if key in rules]",
        "(reading.id, str(reading.index), \"*\") if key in rules][:1]",
    ),
    "a lower limit is others' fault": Fault(
        "usage.py", "min(account.external, account.reserved + account.external - free)",
        "-account.left",
    ),
    "what can never fit is found out later": Fault(
        "core.py", "impossible = never_fit(world, world.settings)",
        "impossible: dict[str, Cause] = {}",
    ),
    "a stalled start does not read its log": Fault("stops.py", "and event.cause.kind not in VAGUE:", "and False:"),
    "one odd answer lasts for ever": Fault(
        "starts.py", "inst.canary_out, inst.canary_works, inst.asked = False, True, None",
        "inst.canary_out, inst.asked = False, None",
    ),
    "no room is said for ever": Fault(
        "starts.py", "if refused and isinstance(find_place(world, inst), Placed):",
        "if False:",
    ),
    "pinned ones make room": Fault("victims.py", "or inst.spec.pinned or leaving(inst)", "or leaving(inst)"),
    "busy ones are asked at once": Fault("victims.py", "case State.READY if busy(inst):\n            return patience",
                                         "case State.READY if busy(inst):\n            return now"),
    "nobody loses patience": Fault("victims.py", "patience = waiting_since(waiter) + waiter.spec.max_wait",
                                   "patience = math.inf"),
    "what was just used goes": Fault("victims.py", "inst.spec.min_resident if used else 0.0", "0.0"),
    "what is freed is anybody's": Fault("placing.py", "    if not claims:\n", "    if True:\n"),
    "one that empties is cut": Fault("demand.py", "if not late and not (inst.told_empty and not inst.direct):",
                                     "if False:"),
    "a door stays shut for nobody": Fault("room.py", "if not needs_room(world.instances[inst.shut_for]):", "if False:"),
    "priority is nothing": Fault("victims.py", "idle, -priority(inst) if not overdue else 0, since", "idle, 0, since"),
    "busy is idle": Fault("health.py", "or inst.shut_for or busy(inst):", "or inst.shut_for:"),
    "those in line are forgotten": Fault(
        "core.py", "if inst.line and inst.state in (State.STOPPED, State.FAILED):", "if False:"
    ),
    "a door opens between the sleeps of a test": Fault(
        "world.py", "if state is State.READY and inst.trial and inst.trial.on:", "if False:"
    ),
    "any reading will do to see what a sleeper keeps": Fault("sleep.py", "if not (calm or", "if not (True or"),
    "what a sleeper keeps is given away": Fault("sleep.py", "{d: min(inst.full[d], max(size, proof.residual))", "{d: 0"),
    "a proof is good for every level": Fault("proofs.py", "return proof if proof is not None and", "return proof if True or"),
    "a sleep that frees nothing counts": Fault("proofs.py", "proof.freed < FREED_LEAST or", ""),
    "a test's memory is given away": Fault("sleep.py", "if not under_trial(inst) and proof", "if proof"),
    "another answer after waking is as good": Fault("sleep.py", "if event.same is False:", "if False:"),
    "a proof outlives a failure": Fault("sleep.py", "        withdraw(world, inst, text)", "        pass"),
    "a sleeper's leak is nothing": Fault("sleep.py", "if growth > GROWTH:", "if False:"),
    "waking needs no room": Fault("placing.py", "if size > max(0, tight.left):", "if False:"),
    "waking disturbs who measures": Fault(
        "placing.py", "busy_on(moves_of_others(world, inst), devices, False)",
        "frozenset()",
    ),
    "sleep disturbs who measures": Fault(
        "stops.py", "if inst.drain_held:\n        inst.deadline",
        "if False:\n        inst.deadline",
    ),
    "a sleeper's line has no deadline": Fault("waking.py", "inst.deadline = inst.queue_until\n    outcome", "outcome"),
    "waking has no limit": Fault("waking.py", "inst.deadline = now + inst.spec.start_stall", "pass"),
    "a crash asleep restarts for nobody": Fault("stops.py", "inst.wanted |= called_for(inst)", "inst.wanted = True"),
    "what a sleeper keeps is out of reach": Fault(
        "victims.py", "case State.ASLEEP if not wanted_awake(inst):\n            return now",
        "case State.ASLEEP if not wanted_awake(inst):\n            return math.inf",
    ),
    "a model under test makes room": Fault(
        "victims.py", "if under_trial(inst) and inst.state is not State.WAITING:\n        return math.inf",
        "if False:\n        pass",
    ),
    "a loan has no end": Fault("loans.py", "if loan.until <= now]", "if False]"),
    "a loan is used twice": Fault("ledger.py", " - max(0, external - loans[0].before)) if loans", ") if loans"),
}  # fmt: skip


def break_it(fault: Fault, package: Path) -> None:
    """Put the fault into the package at `package`."""
    path = package / "core" / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"the core has changed: {fault.old!r} stands {text.count(fault.old)} times in it"
    path.write_text(text.replace(fault.old, fault.new))


def copy(folder: Path) -> None:
    """The package and the core's tests."""
    shutil.copytree(ROOT / "vllmd", folder / "vllmd", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    for name in ("__init__.py", "sim.py", "crowd.py", "mortal.py", *TESTS):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    (folder / "pytest.ini").write_text("[pytest]\n")


def run(folder: Path) -> tuple[bool, str]:
    """Whether the core's tests pass there, and what they said; the scripts first, they are faster."""
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    said = ""
    for name in TESTS:
        words = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        words += ["--hypothesis-seed=0", f"tests/{name}"]
        try:
            done = subprocess.run(
                words, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return False, said + "no end"
        said += done.stdout[-2000:] + done.stderr
        assert done.returncode in (0, 1), said  # 1: tests failed; anything else: they did not run
        if done.returncode:
            return False, said
    return True, said


def test_every_fault_still_has_its_place_in_the_core(tmp_path: Path) -> None:
    """What a fault replaces stands in the core exactly once: checked with the fast tests, so that the list keeps up."""
    for number, fault in enumerate(FAULTS.values()):
        folder = tmp_path / str(number) / "core"
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "vllmd/core" / fault.file, folder)
        break_it(fault, folder.parent)


@pytest.mark.e2e
def test_the_copy_is_what_is_tested_and_passes(tmp_path: Path) -> None:
    """Without a fault all is well, and it is the copy that runs."""
    copy(tmp_path)
    passed, said = run(tmp_path)
    assert passed, said
    (tmp_path / "vllmd/core/core.py").write_text("raise AssertionError\n")
    with pytest.raises(AssertionError):
        run(tmp_path)


@pytest.mark.e2e
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_in_the_core_is_noticed(tmp_path: Path, what: str) -> None:
    """The core's tests fail."""
    copy(tmp_path)
    break_it(FAULTS[what], tmp_path / "vllmd")
    passed, said = run(tmp_path)
    assert not passed, f"nobody notices that {what}\n{said}"
