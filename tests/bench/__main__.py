"""`python -m tests.bench [NAME…] [--json FILE]`: measure, print the table; always ends with 0 when all was measured."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.bench import (
    bench_core,
    bench_crash,
    bench_ctl,
    bench_daemon,
    bench_gateway,
    bench_preflight,
    bench_start,
    bench_swap,
)
from tests.bench.figures import Figure, as_json, machine, table
from tests.bench.peers import DIRECT, KINDS, ROUTER, VLLMD
from tests.bench.stage import compile_modules

Bench = Callable[[argparse.Namespace], list[Figure]]
BENCHES: dict[str, Bench] = {
    "core": lambda _: bench_core.run(),
    "boot": lambda given: bench_daemon.start(given.runs // 2),
    "idle": lambda given: bench_daemon.idle(given.seconds),
    "ctl": lambda given: bench_ctl.run(given.runs),
    "preflight": lambda given: bench_preflight.run(3),
    "crash": lambda given: bench_crash.run(given.rounds),
    "gateway": lambda given: bench_gateway.run(given.peers, quick=given.quick),
    "start": lambda given: bench_start.run(given.pairs),
    "swap": lambda given: bench_swap.run(given.pairs),
}
PEERS = (DIRECT, ROUTER, VLLMD)


def main() -> None:
    """Each named bench in turn; a table at the end, and after each what it found."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(BENCHES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--pairs", type=int, default=3, help="starts of real vLLM, each way (default 3)")
    parser.add_argument(
        "--runs", type=int, default=20, help="runs of each vllmctl (default 20); starts of the daemon: half"
    )
    parser.add_argument("--rounds", type=int, default=30, help="crashes of each kind (default 30)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of idling (default 60)")
    parser.add_argument("--quick", action="store_true", help="gateway: one short round instead of three")
    parser.add_argument(
        "--peers", nargs="+", choices=KINDS, default=PEERS, metavar="PEER",
        help=f"gateway: who is measured, of {', '.join(KINDS)} (default: {', '.join(PEERS)})",
    )  # fmt: skip
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHES):
        parser.error(f"cannot run {', '.join(sorted(unknown))}: there are {', '.join(BENCHES)}")
    compile_modules()
    figures: list[Figure] = []
    for name in given.names or BENCHES:
        before = os.getloadavg()[0]
        found = BENCHES[name](given)
        print(f"\n{name} (load {before:.1f} before, {os.getloadavg()[0]:.1f} after)\n{table(found)}", flush=True)
        figures += found
    load = f"{os.getloadavg()[2]:.1f} over the last 15 minutes"
    print(f"\n{machine()}; load {load}\n{table(figures)}")
    if given.json:
        given.json.write_text(json.dumps(as_json(figures, load), indent=2) + "\n")


if __name__ == "__main__":
    main()
