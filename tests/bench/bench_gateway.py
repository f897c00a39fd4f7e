"""The gateway beside a direct connection and beside vllm-router: requests, bodies, streams, clients that leave.

What is judged is what vllmd adds to a direct connection, and ratios to vllm-router: both within a round, as a machine among
others is faster at one minute than at the next. vllm-router's own values stand beside ours: it is what the targets are of.
"""

from collections.abc import Sequence
from statistics import median

from tests.bench import router
from tests.bench.figures import Figure, shown, spread
from tests.bench.peers import ALONE, DIRECT, ROUTER, VLLMD
from tests.bench.sampling import Cell, Measure, Run, Task

ROUNDS = 4
C1, C32, C256 = Task("c1", 1), Task("c32", 32), Task("c256", 256)
LARGE = Task("1 MB c8", 8, body=1_000_000)
S64, S256 = Task("64 streams", 64, chunks=300), Task("256 streams", 256, chunks=300)
STEP = Task("256 in step", 256, chunks=300, step=True)  # as an engine's batch comes; the targets are of the other kind
STREAMS = (S64, S256, STEP)
TASKS = (C1, C32, C256, LARGE, *STREAMS)


def run(names: Sequence[str] = (DIRECT, ROUTER, VLLMD), *, quick: bool = False) -> list[Figure]:
    """Prints the cells; returns what is judged."""
    chosen = list(names)
    if ROUTER in chosen:
        try:
            router.command()
        except router.NotHadError as error:
            print(f"skipped: {error}")
            chosen.remove(ROUTER)
    found = Run()
    for turn in range(1 if quick else ROUNDS):
        found.round(chosen, TASKS, turn, quick=quick)
    print(f"\n{cells(found, chosen)}\n", flush=True)
    gateways = [name for name in chosen if name in (VLLMD, ALONE)]
    return judged(found, gateways[0]) if gateways and DIRECT in chosen else []


def judged(found: Run, name: str) -> list[Figure]:
    """The gateway's figures with their targets."""
    every = {task: [each.load for each in found.samples[name, task]] for task in TASKS}
    loads = [each for some in every.values() for each in some]
    failed, asked = sum(each.errors for each in loads), sum(each.all + each.errors for each in loads)
    said = next((each.error for each in loads if each.error), "")
    stalls = [max(each.connect, each.first) * 1e3 for task in STREAMS for each in every[task]]
    gone = [each * 1e3 for each in found.gone[name]]
    return [
        *(beside_router(found, name) if found.samples[ROUTER, C32] else []),
        Figure("gateway: requests that failed", failed / asked * 100, "%", 0.0, f"{failed} of {asked}; {said}".rstrip("; ")),
        plain(found, name, C256, "99th percentile", "p99", "ms", 60.0),
        added(found, name, C1, "50th percentile", "p50", 130.0),
        plain(found, name, LARGE, "CPU per request", "cost", "ms", 1.3),
        plain(found, name, S64, "CPU of a core", "share", "%", 13.0),
        added(found, name, S64, "50th percentile", "p50", 110.0),
        added(found, name, S64, "99th percentile", "p99", 200.0),
        plain(found, name, S256, "CPU of a core", "share", "%", 32.0),
        plain(found, name, S256, "99th percentile", "p99", "ms", 5.0),
        plain(found, name, STEP, "99th percentile", "p99", "ms", None),
        Figure("... streams: longest wait for connection or head", max(stalls), "ms", 900.0, "a lost SYN costs 1 s"),
        Figure("... client gone to engine told, median", median(gone), "ms", 100.0, f"{len(gone)} clients"),
        Figure("... client gone to engine told, longest", max(gone), "ms", 100.0, "silent engine and mid-stream alike"),
        Figure("... start until the port answers", median(found.started[name]), "s"),
        Figure("... RSS idle", median(found.idle[name]) / 2**20, "MiB"),
        Figure("... RSS after this load", median(found.loaded[name]) / 2**20, "MiB"),
    ]  # fmt: skip


def beside_router(found: Run, name: str) -> list[Figure]:
    """Ratios."""
    pairs, quiet = found.pairs(name, ROUTER, C32)
    rates, costs = [b.rate / a.rate for a, b in pairs], [a.cost / b.cost for a, b in pairs]
    return [
        Figure(
            "gateway: vllm-router's requests/s by ours, 1 KB, c32", median(rates), "x", 1 / 0.9,
            f"median of {spread(rates)}; {quiet}",
        ),
        Figure(
            "gateway: our CPU per request by vllm-router's, 1 KB, c32", median(costs), "x", 1.1,
            f"median of {spread(costs)}; {quiet}",
        ),
    ]  # fmt: skip


def plain(found: Run, name: str, task: Task, what: str, of: Measure, unit: str, target: float | None) -> Figure:
    """What the gateway takes; beside it what vllm-router takes."""
    factor = {"ms": 1e3, "%": 1.0}[unit]
    cell = found.cell(name, task)
    detail = cell.quiet
    if found.samples[ROUTER, task]:
        detail += f"; vllm-router {shown(found.cell(ROUTER, task).middle(of) * factor, unit)}"
    return Figure(f"... {task.name}: {what}", cell.middle(of) * factor, unit, target, detail)


def added(found: Run, name: str, task: Task, what: str, of: Measure, target: float) -> Figure:
    """What the gateway adds to a direct connection; beside it what vllm-router adds."""
    pairs, quiet = found.pairs(name, DIRECT, task)
    value = [(ours[of] - direct[of]) * 1e6 for ours, direct in pairs]
    detail = f"median of {spread(value)}; {quiet}"
    if found.samples[ROUTER, task]:
        theirs = median((a[of] - b[of]) * 1e6 for a, b in found.pairs(ROUTER, DIRECT, task)[0])
        detail += f"; vllm-router adds {theirs:.0f} us"
    return Figure(f"... {task.name}: {what}, added", median(value), "us", target, detail)


def cells(found: Run, names: Sequence[str]) -> str:
    """All peers beside each other, in Markdown."""
    lines = ["| task | peer | requests/s | p50 | p99 | max | CPU per request | CPU of a core | errors | quiet |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|--:|--:|---|"]
    for task in TASKS:
        for name in names:
            lines.append(row(task, name, found.cell(name, task)))
    lines += ["", "| peer | start | RSS idle | after | client gone: median | longest |", "|---|--:|--:|--:|--:|--:|"]
    for name in names:
        rest = [
            f"{median(found.started[name]):.2f} s",
            *(f"{median(f[name]) / 2**20:.0f} MiB" for f in (found.idle, found.loaded)),
        ]
        gone = [median(found.gone[name]), max(found.gone[name])]
        lines.append(f"| {' | '.join([name, *rest, *(time_of(each) for each in gone)])} |")
    return "\n".join(lines)


def row(task: Task, name: str, cell: Cell) -> str:
    """One task at one peer."""
    most, errors = max(each.load.max for each in cell.every), sum(each.load.errors for each in cell.every)
    values = [time_of(cell.middle("p50")), time_of(cell.middle("p99")), time_of(most)]
    cpu = f"{cell.middle('share'):.1f} %"
    if task.chunks is None:
        values = [f"{cell.middle('rate'):.0f}", *values, time_of(cell.middle("cost")), cpu]
    else:
        values = ["", *values, "", cpu]
    if name == DIRECT:
        values[-2:] = ["", ""]
    return f"| {' | '.join([task.name, name, *values, str(errors), cell.quiet.replace(' samples quiet', '')])} |"


def time_of(seconds: float) -> str:
    """ "72 us", "4.6 ms", "1.02 s"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
