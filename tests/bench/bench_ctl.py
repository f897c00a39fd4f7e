"""How long a whole vllmctl takes, beside a bare Python with http.client in the same run.

    python -m tests.bench.bench_ctl [RUNS]

`status` talks to a fake vllmd in this process, with 8 and with 100 models. Rounds alternate, so that a busy machine
slows all of them; the medians count, the ratios more than the times.
"""

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from tests.ctl_daemon import Daemon
from tests.ctl_status import crowd, example

BASE = "import http.client"
ROOT = Path(__file__).parent.parent.parent


def once(command: list[str]) -> float:
    """Seconds of one run, from exec to exit."""
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    return time.perf_counter() - began


def main(runs: int = 15) -> None:
    """Print a line per command."""
    with ExitStack() as stack:
        few, many = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        small = stack.enter_context(Daemon(few, {"GET /api/v1/status": example()}))
        large = stack.enter_context(Daemon(many, {"GET /api/v1/status": crowd()}))
        ctl = [sys.executable, "-m", "vllmd.ctl", "status", "--socket"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            BASE: [sys.executable, "-c", BASE],
            "status --json, 8 models": [*ctl, str(small.path), "--json"],
            "status --json, 100 models": [*ctl, str(large.path), "--json"],
            "status, 8 models": [*ctl, str(small.path)],
            "status, 100 models": [*ctl, str(large.path)],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(once(command))
    base = median(times[BASE])
    print(f"{'median of ' + str(runs):<28} {'ms':>7} {'min':>7}  x http.client")
    for name, taken in times.items():
        print(f"{name:<28} {median(taken) * 1e3:7.1f} {min(taken) * 1e3:7.1f}  {median(taken) / base:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
