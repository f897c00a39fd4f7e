"""Real vLLM started from the warm spare and by hand, in turns; and what a swap between two models that do not fit together
consists of, part by part.

Each start from the spare is asked for when one has been parked; that it was one is read from the log.
"""

import http.client
import json
import time
from statistics import median
from typing import Any

from tests.bench.bench_start import ENGINE, NAME, Times, by_hand, free_port, through_vllmd
from tests.bench.figures import Figure, middle
from tests.bench.stage import daemon_in, scratch
from tests.e2e.daemon import Daemon

LIMIT = 300.0  # seconds
PHASES = ("import", "download", "load", "measure", "compile", "graphs", "http")


def run(pairs: int) -> list[Figure]:
    """The order alternates from pair to pair; one start of each kind before that fills the caches."""
    warm: list[Times] = []
    bare: list[Times] = []
    with scratch() as folder:
        port = free_port()
        table = f'[models.{NAME}]\nmodel = "{{models}}/{NAME}"\nport = {port}\n'
        with daemon_in(folder, ENGINE, table, spare=1) as daemon:
            daemon.start()
            recipe, _ = through_vllmd(daemon, port)
            by_hand(recipe, port, folder)
            for pair in range(pairs):
                for kind in ("warm", "bare") if pair % 2 else ("bare", "warm"):
                    await_spare(daemon)
                    if kind == "bare":
                        bare.append(by_hand(recipe, port, folder))
                    else:
                        before = len(daemon.said("started from the warm spare"))
                        recipe, times = through_vllmd(daemon, port)
                        assert len(daemon.said("started from the warm spare")) == before + 1
                        warm.append(times)
            await_spare(daemon)
            held = int(daemon.client.get("/api/v1/status")["daemon"]["spare"])
    ratios = [ours.start / theirs.start for ours, theirs in zip(warm, bare, strict=True)]
    figures = [
        Figure(
            "start from a warm spare / by hand, real vLLM", median(ratios), "x", 0.75,
            f"median of {len(ratios)} pairs, {min(ratios):.3f} to {max(ratios):.3f}",
        ),
        middle("... from the spare", [t.start for t in warm], "s"),
        middle("... by hand", [t.start for t in bare], "s"),
        Figure("... memory of a parked one", held / 2**20, "MiB"),
    ]  # fmt: skip
    return figures + swaps()


def swaps() -> list[Figure]:
    """alpha and beta in turns, room for one, asked through the gateway; the median of each part."""
    parts: dict[str, list[float]] = {}
    with scratch() as folder:
        table = "".join(f'[models.{name}]\nmodel = "{{models}}/{name}"\n' for name in ("alpha", "beta"))
        with daemon_in(
            folder, ENGINE, table, defaults='min_resident = "0s"', limit="2.3GiB", spare=1, web=True
        ) as daemon:  # fmt: skip
            daemon.start()
            ask(daemon, "alpha")
            for turn in range(4):
                await_spare(daemon)
                name = ("beta", "alpha")[turn % 2]
                began = time.monotonic()
                ask(daemon, name)
                for part, seconds in timeline(daemon, name, time.monotonic() - began):
                    parts.setdefault(part, []).append(seconds)
    targets = {"victim told to drain until the successor may start": 3.0}
    return [middle(f"swap: {part}", values, "s", targets.get(part)) for part, values in parts.items()]


def timeline(daemon: Daemon, name: str, whole: float) -> list[tuple[str, float]]:
    """The parts of the last swap, as vllmd's log and its events tell them."""
    told = daemon.said('"kind": "swap"')[-1]["event"]
    print(f"swap to {name}, {whole:.1f} s: {told}", flush=True)
    events = [json.loads(line) for line in daemon.client.fetch("GET", "/api/v1/events?follow=0")[1].splitlines()]
    mine = [e["data"] for e in events if e["event"] == "model" and e["data"]["name"] == name]
    room = [e["data"] for e in events if e["event"] == "note" and e["data"]["kind"] == "swap"][-1]["time"]
    evict = [e["data"] for e in events if e["event"] == "note" and e["data"]["kind"] == "evict"][-1]["time"]
    last = [each for each in mine if each["attempt"] == mine[-1]["attempt"]]
    seen: dict[str, float] = {}
    for each in last:
        if each["phase"]:
            seen[each["phase"]] = each["elapsed_s"]
    phases = [(f"start, {phase} last seen after", seen[phase]) for phase in PHASES if phase in seen]
    return [
        ("whole request, from asking to its answer", whole),
        ("victim told to drain until the successor may start", room - evict),
        *phases,
    ]


def ask(daemon: Daemon, name: str) -> Any:
    """One request through the gateway."""
    connection = http.client.HTTPConnection(daemon.url.partition("://")[2], timeout=LIMIT)
    body = {"model": name, "prompt": "a", "max_tokens": 1}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    value = answer.read()
    connection.close()
    assert answer.status == 200, value
    return value


def await_spare(daemon: Daemon) -> None:
    """Until one has imported."""
    end = time.monotonic() + LIMIT
    while not daemon.client.get("/api/v1/status")["daemon"]["spare_ready"]:
        assert time.monotonic() < end, "no spare is parked"
        time.sleep(0.2)
