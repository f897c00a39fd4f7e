"""What each state says: one sentence, and at most 24 characters for a table. Every surface shows these."""

import signal
from dataclasses import dataclass

from vllmd.core.ledger import device_label
from vllmd.core.proofs import proof_of
from vllmd.core.states import State
from vllmd.core.world import Instance, World
from vllmd.facts import Phase
from vllmd.spec import Remedy
from vllmd.units import count, gib, span

#: Long and short word for each phase. "importing vLLM" has a name: it takes 15 to 75 s.
PHASES = {
    None: ("starting the process", "starting"),
    Phase.IMPORT: ("importing vLLM", "importing"),
    Phase.DOWNLOAD: ("downloading", "download"),
    Phase.LOAD: ("loading weights", "weights"),
    Phase.MEASURE: ("measuring memory", "measuring"),
    Phase.COMPILE: ("compiling", "compiling"),
    Phase.GRAPHS: ("capturing graphs", "graphs"),
    Phase.HTTP: ("opening the port", "opening port"),
}
SILENT_KINDS = ("no-device", "device-silent")  # of causes that pass when a device answers again
#: Why one goes that goes for no other model (loans.LENT, sleep.REST).
AWAY = {"(lent)": "its memory is lent", "(sleep)": "an operator wants it asleep"}
QUIET = 30.0  # seconds without a sign of life before a start says so


@dataclass(frozen=True, slots=True)
class Why:
    """The sentence of an instance's state, as every surface shows it."""

    kind: str
    text: str
    short: str
    remedies: tuple[Remedy, ...] = ()


@dataclass(frozen=True, slots=True)
class Outlook:
    """How far a start is: `overall` 0..0.99 of the whole by past phase times, `left` seconds; None without a past."""

    overall: float | None
    left: float | None
    usual: float | None


def outlook(world: World, inst: Instance, now: float) -> Outlook:
    """Finished phases count with what they usually take, the current one never with all of it: it cannot go back."""
    learned = world.learned.get(inst.key)
    if inst.state is State.WAKING and (proof := proof_of(world, inst)) is not None:
        return Outlook(None, max(0.0, proof.wake_s - (now - inst.since)), learned.total if learned else None)
    if learned is None or not learned.total or inst.state is not State.STARTING:
        return Outlook(None, None, learned.total if learned and learned.total else None)
    order = list(Phase)
    here = order.index(inst.phase) if inst.phase else -1
    known = {Phase(name): seconds for name, seconds in learned.phases.items()}
    lead = max(0.0, learned.total - sum(known.values()))  # before the first line of the log
    before = lead + sum(seconds for phase, seconds in known.items() if order.index(phase) < here) if here >= 0 else 0.0
    current = known.get(inst.phase, 0.0) if inst.phase else lead
    spent = now - inst.phase_since
    done = before + min(spent, 0.95 * current)
    left = max(0.0, learned.total - before - min(spent, current))
    return Outlook(min(0.99, done / learned.total), left, learned.total)


def explain(world: World, inst: Instance, now: float) -> Why:
    """The sentence and the short form for the instance's state."""
    cause = inst.cause
    match inst.state:
        case State.WAITING:
            waits = f" ({count(inst.line, 'request')} in line)" if inst.line else ""
            return Why("waiting", inst.waiting_text + waits, wait_short(world, inst))
        case State.STARTING:
            return starting(world, inst, now)
        case State.READY:
            return ready(world, inst, now)
        case State.DOZING | State.ASLEEP | State.WAKING:
            return asleep(world, inst)
        case State.DRAINING:
            return draining(inst, now)
        case State.STOPPING:
            text = inst.leak or ("waiting for its memory to come back" if inst.gone else "ending its processes")
            return Why("stopping", text, "memory coming back" if inst.gone else "ending")
        case State.BACKOFF:
            pause = f"start {len(inst.failures) + 1} of {inst.spec.restart.max_failures} in {span(left(inst, now))}"
            said = f" ({cause.text})" if cause else ""
            what = "crashed" if inst.crashed else "stopped" if cause and cause == inst.last else "could not start"
            text = f"{what} {span(now - inst.broke_at)} ago{said}; {pause}"
            return Why(cause.kind if cause else "crashed", text, pause, cause.remedies if cause else ())
        case _ if cause:
            return Why(cause.kind, cause.text, cause.short, cause.remedies)
    return Why("", "", "")


def left(inst: Instance, now: float) -> float:
    """Seconds until the instance's deadline."""
    return max(0.0, (inst.deadline or now) - now)


def wait_short(world: World, inst: Instance) -> str:
    if inst.inspecting:
        return "checking"
    names = ", ".join(inst.waits_for)
    if any(world.instances[name].measuring for name in inst.waits_for if name in world.instances):
        return f"{names} measures"[:24]
    if not names and inst.cause and inst.cause.kind in SILENT_KINDS:
        return "for a device"
    return (f"{names} stops" if names else "for memory")[:24]


def starting(world: World, inst: Instance, now: float) -> Why:
    """Phase, its own figure, time so far, and one of: time left, first start, longer than usual, no sign of life."""
    word, brief = PHASES[inst.phase]
    figure = inst.phase_note or (
        f"{inst.phase_fraction:.0%}".replace("%", " %") if inst.phase_fraction is not None else ""
    )
    so_far = now - inst.started
    view = outlook(world, inst, now)
    quiet = now - inst.heard
    if quiet >= QUIET:
        rest = f"no sign of life for {span(quiet)}, given up at {span(inst.spec.start_stall)}"
        tail = f"silent {span(quiet)}"
    elif view.usual is None:
        rest, tail = "first start, no estimate yet", seconds(so_far)
    elif so_far > view.usual:
        rest, tail = f"{span(so_far - view.usual)} longer than usual", f"{span(so_far - view.usual)} late"
    else:
        rest, tail = f"about {span(view.left or 0)} left", f"{span(view.left or 0)} left"
    text = f"{word} {figure}".rstrip() + f" · {seconds(so_far)} so far · {rest}"
    short = f"{brief} {figure}".rstrip() + f", {tail}"
    if len(short) > 24:
        short = f"{brief}, {tail}"
    return Why("starting", text, short)


def ready(world: World, inst: Instance, now: float) -> Why:
    """Nothing, or a warning, or for whom it goes."""
    if inst.shut_for:
        begun = inst.under_way + inst.direct
        most = span(max(0.0, inst.shut_at + inst.spec.max_drain - now))
        requests = count(begun, "request")
        if inst.trial and inst.trial.on:
            return Why("swap-test", f"{requests} left, then its sleep is tested", "swap-test")
        if inst.shut_for not in world.instances:
            why = AWAY.get(inst.shut_for, "it was idle for its ttl")
            text = f"{requests} left, then it {'sleeps' if inst.dozes else 'ends'}: {why}"
            return Why("draining", text, "idle, sleeps soon" if inst.dozes else "idle, ending")
        text = f"{requests} left, then it makes room for {inst.shut_for}, in at most {most}"
        return Why("draining", text, f"{begun} left, for {inst.shut_for}"[:24])
    promise = world.ledger.held.get(inst.id, {})
    for device, size in promise.items():
        reading = world.ledger.readings.get(device)
        over = reading.instances.get(inst.id, 0) - size if reading else 0
        if inst.over_since is not None and reading is not None and over > 0:
            on = device_label(reading)
            text = f"uses {gib(over)} more than the {gib(size)} reserved on {on}"
            # What it takes without a given vram is learned: its next start reserves that much.
            helps = (
                f"raise models.{inst.spec.name}.vram" if inst.spec.vram is not None else f"vllmctl restart {inst.id}"
            )
            return Why("overrun", text, f"{gib(over)} over", (Remedy(helps),))
    return Why("", inst.leak, "")


def asleep(world: World, inst: Instance) -> Why:
    """How deep, what it keeps, and how long waking takes."""
    proof = proof_of(world, inst)
    trial = inst.trial if inst.trial and inst.trial.on else None
    note = f" · swap-test, {len(trial.cycles)} done" if trial else ""
    usual = f", awake in about {seconds(proof.wake_s)}" if proof else ""
    match inst.state:
        case State.DOZING if inst.drain_held:
            return Why("dozing", "its sleep waits until a neighbour has measured its memory", "waits for neighbour")
        case State.DOZING:
            return Why("dozing", "gives its memory back" + note, "falling asleep")
        case State.WAKING:
            return Why("waking", "takes its memory back" + usual + note, "waking")
    kept = gib(sum(world.ledger.held.get(inst.id, {}).values()))
    waits = f"; {count(inst.line, 'request')} in line: {inst.waiting_text}" if inst.line else ""
    return Why("asleep", f"asleep, {kept} kept{usual}{note}{waits}", f"{kept} kept")


def seconds(value: float) -> str:
    """A running time: "0 s" rather than "938 ms"."""
    return span(value) if value >= 1 else "0 s"


def draining(inst: Instance, now: float) -> Why:
    if inst.drain_held:
        return Why("draining", "its stop waits until a neighbour has measured its memory", "waits for neighbour")
    begun = inst.running + inst.waiting
    most = span(left(inst, now))
    return Why("draining", f"{count(begun, 'request')} left, stops in at most {most}", f"{begun} left, {most} at most")


def leader_ended(status: int | None) -> str:
    """How a process that nobody asked to end did so: "exited by itself with code 0", "killed by SIGKILL"."""
    if status is None:
        return "ended"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited by itself with code {status}"


def member_died(name: str, pid: int) -> str:
    """The end of an engine process under a live leader. The kernel cuts names after 15 bytes."""
    short = name.removeprefix("VLLM::").rstrip()
    return f"{'EngineCore' if short == 'EngineCor' else short} (pid {pid}) died"
