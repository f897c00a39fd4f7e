"""vllmd as a service, installed from its package into a real systemd that is thrown away afterwards: each test plays one of
the stories in tests/box. Where the tools that make such a systemd are missing they are skipped, with the reason.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Report
from tests.e2e.daemon import ROOT

TOOLS = ROOT.parent / "shared/tools"
LIMIT = 900.0  # seconds for one story
DEATHS = 50  # of vllmd, at random moments
PARTS = ("vllmd", "packaging", "systemd", "etc", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package of this tree. In the tree: a box sees no other temporary files."""
    if not shutil.which("dpkg-deb") or not Path("/usr/bin/python3").exists():
        pytest.skip("no dpkg-deb or no Debian Python here")
    return build(ROOT)


@pytest.fixture(scope="session")
def newer(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package under the next version."""
    tree = tmp_path_factory.mktemp("newer") / "vllmd"
    tree.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tree / part)
    version = tree / "vllmd/__init__.py"
    text, count = re.subn(
        r'(__version__ = "\d+\.\d+\.)(\d+)"', lambda m: f'{m[1]}{int(m[2]) + 1}"', version.read_text()
    )
    assert count == 1
    version.write_text(text)
    made = build(tree)
    return shutil.copy(made, deb.parent / made.name)


def build(tree: Path) -> Path:
    """As `make deb`, with the Python of this process: whatever set-up the tree would make is not wanted twice."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    call(tree, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", "dist", ".")
    (wheel,) = (tree / "dist").glob("*.whl")
    call(tree, "packaging/deb/build.py", wheel)
    (made,) = (tree / "dist").glob("vllmd_*.deb")
    return made


def call(tree: Path, *words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def play(report: Report, box: list[str | Path], story: str, *words: str | Path) -> None:
    """One story in a box; what it measured goes into the table."""
    tool = TOOLS / str(box[0])
    if os.geteuid() or not tool.exists():
        pytest.skip(f"a throw-away systemd needs root and {tool.name}")
    argv = [tool, *box[1:], "--", sys.executable, "-m", f"tests.box.{story}", *words]
    done = subprocess.run(
        [*map(str, argv)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith('{"report"'):
            row = json.loads(line)
            report(row["report"], row["value"])
    assert done.returncode == 0, done.stdout[-20000:]


@pytest.mark.timeout(LIMIT)
def test_installed_used_restarted_upgraded_stopped_removed(
    report: Report, deb: Path, newer: Path, engine: Path
) -> None:
    """With real vLLM: its requests are answered throughout, its lines are in the journal, nothing is left."""
    play(report, ["sdbox", "run"], "package", deb, newer)


@pytest.mark.timeout(LIMIT)
def test_killed_at_any_moment_every_model_is_as_it_was(report: Report, deb: Path) -> None:
    """None twice, none lost, none orphaned."""
    play(report, ["sdbox", "run"], "deaths", deb, str(DEATHS), str(random.randrange(1 << 30)))


@pytest.mark.timeout(LIMIT)
def test_a_blocked_loop_many_requests_many_models_a_broken_configuration(report: Report, deb: Path) -> None:
    """The watchdog, the control socket over restarts, adoption of eight, a daemon that cannot start any more."""
    play(report, ["sdbox", "run"], "troubles", deb)


@pytest.mark.timeout(LIMIT)
def test_a_users_own_service(report: Report, deb: Path) -> None:
    """systemctl --user."""
    play(report, ["sdbox", "run"], "user", deb)


@pytest.mark.timeout(LIMIT)
def test_out_of_memory(report: Report, deb: Path) -> None:
    """On a kernel with memory controllers: one model's end is its own, and `why` names the kernel."""
    if not shutil.which("linux.uml") or not shutil.which("busybox"):
        pytest.skip("no user-mode-linux or busybox-static here: no kernel with memory controllers")
    play(report, ["umlbox", "-m", "7G", "-t", "600"], "memory", deb)
