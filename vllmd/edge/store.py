"""What must survive the daemon, in its state directory: learned needs and last good starts, each file written whole.

A file that cannot be read is set aside and named, never a reason not to start; a disk that is full costs what was to be
written, nothing else. One daemon per state directory: a lock that dies with its holder.
"""

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllmd.facts import Learned


class Taken(Exception):
    """Another daemon uses this state directory; the message names it."""


class Store:
    """The state directory. `complaints` collects what went wrong, for the operator; reading it empties it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock: int | None = None
        self._complaints: list[str] = []
        self._writing = threading.Lock()  # a write that hangs may be given up, and is not to be met by another one

    def lock(self) -> None:
        """Take the directory for this process, until it ends. Raises Taken with the holder's pid, OSError if unwritable."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o750)
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise Taken(
                f"vllmd already runs on {self.directory} (pid {holder}): stop it, or set daemon.state_dir to another one"
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only its label is missing
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        self._lock = fd

    def unlock(self) -> None:
        """Give the directory back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def complaints(self) -> list[str]:
        """What could not be read or written since the last call."""
        said, self._complaints = self._complaints, []
        return said

    def learned(self) -> dict[str, Learned]:
        """All learned needs that can be understood; {} when there are none or the file is damaged."""
        needs = {}
        for key, value in self._read("needs.json").items():
            with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError, OverflowError):
                phases = {str(phase): float(seconds) for phase, seconds in value["phases"].items()}
                needs[key] = Learned(int(value["base"]), int(value["kv"]), phases, float(value["total"]))
        return needs

    def good(self) -> dict[str, dict[str, str]]:
        """What each model's last good start ran with."""
        return {
            name: {str(k): str(v) for k, v in words.items()}
            for name, words in self._read("good.json").items()
            if isinstance(words, dict)
        }

    def keep_learned(self, needs: Mapping[str, Learned]) -> None:
        """Write all learned needs."""
        self._write("needs.json", {key: asdict(value) for key, value in needs.items()})

    def keep_good(self, good: Mapping[str, Mapping[str, str]]) -> None:
        """Write the last good starts."""
        self._write("good.json", {name: dict(words) for name, words in good.items()})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            value = json.loads(path.read_bytes())
            if not isinstance(value, dict):
                raise ValueError("not a table")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            aside = path.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                path.rename(aside)
            self._complaints.append(f"cannot read {path}: {error}; set aside as {aside.name}, starting without it")
            return {}
        return value

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        """Whole or not at all: temporary file, fsync, rename."""
        path, temporary = self.directory / name, self.directory / f".{name}.new"
        try:
            with self._writing, temporary.open("w") as file:
                json.dump(value, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
                temporary.rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._complaints.append(f"cannot write {path}: {error.strerror}; it stays as it was")
