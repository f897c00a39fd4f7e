"""Flags are read from vLLM's sources in milliseconds: the real parser, asked once, knows the same."""

import os
import re
import subprocess
import time
from pathlib import Path

from tests.e2e.conftest import Report
from vllmd.edge.engine import read_installation

HELP = ("help",)


def test_flags_found_in_the_sources_are_those_of_the_real_parser(engine: Path, report: Report) -> None:
    """Every flag that `vllm serve --help=all` shows is known, and no other; --no-X comes from a boolean X."""
    began = time.monotonic()
    found = read_installation(engine / "bin/vllm").facts
    static = time.monotonic() - began
    began = time.monotonic()
    text = subprocess.run(
        [engine / "bin/vllm", "serve", "--help=all"],
        capture_output=True, text=True, check=True, timeout=300, stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
    ).stdout  # fmt: skip
    asked = time.monotonic() - began
    # Two spaces: further in are explanations, with examples of flags that do not exist.
    heads = [line for line in text.splitlines() if re.match(r"  --?[A-Za-z]", line)]
    shown = {name for line in heads for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*)", line)} - set(HELP)
    assert found.flags is not None
    assert len(shown) > 200
    assert found.flags - shown == set()
    unknown = {name for name in shown - found.flags if not (name.startswith("no-") and name[3:] in found.flags)}
    assert unknown == set()
    report(f"{len(found.flags)} flags of vLLM {found.version} from its sources", static)
    report("the same from --help=all", asked)
