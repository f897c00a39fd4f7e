"""Rounds in which each task goes to all peers one after the other; who is first changes from one to the next.

Of each sample it is known what other jobs took; where there are quiet ones, only these count.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from tests.bench.native import Load, connect, load, program, request, tagged
from tests.bench.peers import Peer, memory, peers
from tests.bench.usage import moment

QUIET = 0.4  # cores: a sample is quiet when others took less
LEAVERS = 15  # clients that leave, of each kind, each round
GIVEN_UP = 20.0  # seconds without the close of a connection
PATH = "/v1/chat/completions"
Measure = Literal["rate", "cost", "share", "p50", "p99", "others"]


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of each peer. `chunks` of 50 a second for each stream, those of all streams at once when they are `in
    step`; None: plain requests with `body` bytes."""

    name: str
    connections: int
    body: int = 1024
    chunks: int | None = None
    step: bool = False

    def run(self, peer: Peer, *, quick: bool) -> Load:
        """Ask it of a peer."""
        if self.chunks is None:
            seconds = 1.5 if quick else 3.0
            many = {"connections": self.connections, "body": self.body}
            return load("plain", peer.port, peer.key, **many, seconds=seconds, warm=0.4)
        chunks = self.chunks // 3 if quick else self.chunks
        return load("stream", peer.port, peer.key, connections=self.connections, chunks=chunks, step=self.step)


@dataclass(frozen=True, slots=True)
class Sample:
    """One task at one peer. `wall` and `cpu` in seconds, the proxy's; `others` in cores."""

    load: Load
    wall: float
    cpu: float
    others: float

    def __getitem__(self, measure: Measure) -> float:
        return float(getattr(self, measure))

    @property
    def p50(self) -> float:
        """Seconds."""
        return self.load.p50

    @property
    def p99(self) -> float:
        """Seconds."""
        return self.load.p99

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.load.requests / self.load.seconds

    @property
    def cost(self) -> float:
        """Seconds of CPU for a request."""
        return self.cpu / max(1, self.load.all)

    @property
    def share(self) -> float:
        """Of a core, in percent."""
        return self.cpu / self.wall * 100


@dataclass(frozen=True, slots=True)
class Cell:
    """All samples of one task at one peer, and those that count."""

    every: list[Sample]

    @property
    def counted(self) -> list[Sample]:
        return [each for each in self.every if each.others < QUIET] or self.every

    def middle(self, of: Measure) -> float:
        """The median of those that count."""
        return median(each[of] for each in self.counted)

    @property
    def quiet(self) -> str:
        """ "2 of 3 samples quiet (0.1 cores)": what others took in those that count."""
        count = sum(each.others < QUIET for each in self.every)
        return f"{count} of {len(self.every)} samples quiet ({self.middle('others'):.1f} cores)"


class Run:
    """All that is found, by peer."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, Task], list[Sample]] = defaultdict(list)
        self.gone: dict[str, list[float]] = defaultdict(list)
        self.started: dict[str, list[float]] = defaultdict(list)
        self.idle: dict[str, list[int]] = defaultdict(list)
        self.loaded: dict[str, list[int]] = defaultdict(list)

    def cell(self, peer: str, task: Task) -> Cell:
        return Cell(self.samples[peer, task])

    def pairs(self, one: str, other: str, task: Task) -> tuple[list[tuple[Sample, Sample]], str]:
        """Both peers' samples of the same rounds: of those in which both were quiet, if there are any; and how many were."""
        every = list(zip(self.samples[one, task], self.samples[other, task], strict=True))
        calm = [pair for pair in every if max(each.others for each in pair) < QUIET]
        return calm or every, f"{len(calm)} of {len(every)} rounds quiet"

    def round(self, names: Sequence[str], tasks: Sequence[Task], turn: int, *, quick: bool) -> None:
        """Start all, ask all, end all."""
        with peers(names) as found:
            for peer in found:
                self.started[peer.name].append(peer.started)
                self.idle[peer.name].append(peer.idle)
            for at, task in enumerate(tasks):
                for peer in turned(found, turn + at):
                    self.samples[peer.name, task].append(sample(peer, task, quick=quick))
            for peer in found:
                self.loaded[peer.name].append(memory(peer))
                self.gone[peer.name] += leave(peer, LEAVERS // 3 if quick else LEAVERS)


def turned(found: list[Peer], turn: int) -> Iterable[Peer]:
    """Another one first each time, and each second time in the other direction."""
    at = turn % len(found)
    order = found[at:] + found[:at]
    return reversed(order) if turn // len(found) % 2 else order


def sample(peer: Peer, task: Task, *, quick: bool) -> Sample:
    """One task at one peer, with what it cost."""
    before, began = moment(), time.monotonic()
    result = task.run(peer, quick=quick)
    wall, after = time.monotonic() - began, moment()
    cpu = 0.0
    if peer.pid is not None:
        cpu = after.cpu(peer.pid, program("stub")) - before.cpu(peer.pid, program("stub"))
    return Sample(result, wall, cpu, (after.others - before.others) / wall)


# -- clients that leave -----------------------------------------------------------------------------------------------


def leave(peer: Peer, times: int) -> list[float]:
    """Seconds from a client's close until the stub saw its own connection closed: half while it is silent, half in the
    middle of a stream."""
    return [leave_once(peer, f"{kind}-{peer.name}-{turn}") for turn in range(times) for kind in ("silent", "stream")]


def leave_once(peer: Peer, tag: str) -> float:
    """GIVEN_UP and more when it never was closed."""
    stream = tag.startswith("stream")
    value = {
        "model": "bench",
        "user": tag,
        "max_tokens": 1000,
        "stream": stream,
        "messages": [{"role": "user", "content": "a"}],
    }
    with connect(peer.port) as sock:
        sock.sendall(request("POST", PATH, peer.key, value))
        await_stub(peer, tag, lambda arrived, _: arrived > 0)
        seen = b""
        while stream and b"data: " not in seen:
            data = sock.recv(1 << 16)
            assert data, f"{peer.name} ended a stream: {seen!r}"
            seen += data
        left = time.monotonic_ns()
    return (await_stub(peer, tag, lambda _, closed: closed > 0) - left) / 1e9


def await_stub(peer: Peer, tag: str, until: Callable[[int, int], bool]) -> int:
    """What the stub says of the request, once it is so: when its connection was closed, or now."""
    limit = time.monotonic() + GIVEN_UP
    while time.monotonic() < limit:
        if (seen := tagged(peer.stub).get(tag)) and until(seen.arrived, seen.closed):
            return seen.closed
        time.sleep(0.005)  # the stub keeps the time itself
    return time.monotonic_ns()
