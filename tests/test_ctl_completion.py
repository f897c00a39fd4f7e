"""Completion scripts: shells take them, and they offer what is there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ctl_daemon import LIMIT, Daemon
from tests.ctl_status import example
from vllmd.ctl.__main__ import main
from vllmd.ctl.arguments import visible

ASK = """
source "$1"
COMP_WORDS=(vllmctl {words}); COMP_CWORD={at}
_vllmctl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / f"vllmctl.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_its_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No syntax error; every command is in it."""
    path = script(shell, tmp_path, capsys)
    assert [name for name in visible() if name not in path.read_text()] == []
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here to check the syntax")
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def complete(folder: Path, path: Path, *words: str, socket: Path | None = None) -> list[str]:
    """What bash offers for the last of `words`."""
    tool = folder / "vllmctl"
    where = f"--socket {socket}" if socket else f"--socket {folder}/none"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m vllmd.ctl {where} "$@"\n')
    tool.chmod(0o755)
    code = ASK.format(words=" ".join(f"'{word}'" for word in words), at=len(words))
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        ["bash", "-c", code, "bash", str(path)], capture_output=True, text=True, timeout=LIMIT, check=True,
        env={"PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": root},
    )  # fmt: skip
    return done.stdout.split()


def test_bash_offers_commands_options_and_live_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from the running daemon; without one nothing is offered and nothing is said."""
    path = script("bash", tmp_path, capsys)
    assert complete(tmp_path, path, "st") == ["status", "start", "stop"]
    assert complete(tmp_path, path, "logs", "--f") == ["--follow", "--failed"]
    assert complete(tmp_path, path, "start", "") == []
    with Daemon(tmp_path, {"GET /api/v1/status": example()}) as daemon:
        assert complete(tmp_path, path, "start", "n", socket=daemon.path) == ["nanonets-ocr"]
        assert complete(tmp_path, path, "--socket", "x", "stop", "--category", "", socket=daemon.path) == ["ocr"]
