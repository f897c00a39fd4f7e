"""The records of instances on disk: one file each, written whole, read once by the next daemon.

A file tells which boot of the machine it belongs to; pids and times of another boot mean nothing. One that cannot be
understood is set aside and named: its engine, if it lives, is a leftover then.
"""

import contextlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import cattrs

from vllmd.edge.store import sync_directory
from vllmd.record import Record

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NOTES = (".at", ".shm")  # what the wiring notes beside a record: how far its log was read, its shared memory
FORMAT = 1  # grows when an older vllmd could misread a record; fields may come and go without


def boot_id() -> str:
    """Names this boot of the machine; "" where the kernel does not say."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Records:
    """The records in a directory. Every method may block: not on the loop."""

    def __init__(self, directory: Path, boot: str) -> None:
        self.directory, self.boot = directory, boot

    def write(self, record: Record) -> None:
        """Whole or not at all, and on disk when it returns. Raises OSError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(record.id)
        temporary = path.with_suffix(".new")
        text = json.dumps({"format": FORMAT, "boot": self.boot, "record": asdict(record)})
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:  # noqa: PTH123
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(self.directory)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def remove(self, instance: str) -> None:
        """Forget an instance, with what is noted beside its record; none is fine."""
        _drop(self._path(instance))

    def clear(self) -> None:
        """Forget all: nothing is left that a record could tell of."""
        for path in self._all():
            _drop(path)

    def read(self) -> tuple[list[Record], list[str]]:
        """All records of this boot, and what could not be understood, as sentences. Records of another boot are removed."""
        records, troubles = [], []
        for path in self._all():
            try:
                raw = json.loads(path.read_bytes())
                if raw["format"] > FORMAT:
                    raise ValueError(f"written by a newer vllmd (format {raw['format']})")
                if raw["boot"] != self.boot:
                    _drop(path)
                    continue
                record = cattrs.structure(raw["record"], Record)
                if self._path(record.id) != path:
                    raise ValueError(f"it is about {record.id!r}")
                records.append(record)
            except FileNotFoundError:
                continue
            except (
                OSError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RecursionError,
                cattrs.BaseValidationError,
            ) as error:
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(".damaged"))
                troubles.append(f"cannot read {path}: {_short(error)}; set aside as {path.stem}.damaged")
        return records, troubles

    def _path(self, instance: str) -> Path:
        return self.directory / f"{instance.replace('/', '%')}.json"

    def _all(self) -> Collection[Path]:
        try:
            return sorted(self.directory.glob("*.json"))
        except OSError:
            return []


def _drop(record: Path) -> None:
    for path in (record, *(record.with_suffix(suffix) for suffix in NOTES)):
        with contextlib.suppress(OSError):
            path.unlink()


def _short(error: Exception) -> str:
    if isinstance(error, cattrs.BaseValidationError):
        return "; ".join(cattrs.transform_error(error))[:300]
    return f"{type(error).__name__}: {error}"[:300]
