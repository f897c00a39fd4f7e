"""NVIDIA devices through NVML (package nvidia-ml-py, module pynvml).

NVML can fail at any moment: a driver update replaces the library under a running kernel module, a card falls off the
bus, another program resets it. None of it raises here: what still answers is returned, with a sentence about the rest,
and the library is opened anew with growing pauses. A card that was once seen is missed by name.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllmd.facts import DeviceReading, Holder

#: Seconds before NVML is opened again after it failed; doubled up to the second.
PAUSE, PAUSE_MAX = 1.0, 60.0
NAMED = 8

#: What an operator can do about an error, by NVML's own name for it.
ADVICE: Mapping[str, str] = {
    "LIBRARY_NOT_FOUND": "install the NVIDIA driver",
    "DRIVER_NOT_LOADED": "load the driver: modprobe nvidia",
    "LIB_RM_VERSION_MISMATCH": "the driver was updated: reboot, or reload its kernel module and restart vllmd",
    "GPU_IS_LOST": "it fell off the bus: see dmesg for Xid errors, then reboot",
    "RESET_REQUIRED": "reset it: nvidia-smi --gpu-reset, or reboot",
    "NO_PERMISSION": "let vllmd read /dev/nvidia*",
    "INSUFFICIENT_POWER": "check its power cables",
    "IRQ_ISSUE": "see dmesg, then reboot",
}


@dataclass(frozen=True, slots=True)
class Label:
    """A device that was seen, to name it when it is missed."""

    text: str
    id: str


class Nvml:
    """Reads all NVIDIA devices. Not thread-safe: one reader."""

    def __init__(
        self, module: str | Any = "pynvml", proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source, self._proc, self._clock = module, proc, clock
        self._lib: Any = None
        self._open = False
        self._pause, self._retry_at = PAUSE, 0.0
        self._seen: dict[str, Label] = {}
        self._why = ""
        self.missing = False  # there is no NVIDIA library on this machine

    @property
    def seen(self) -> bool:
        """Whether a device was ever read: from then on a silence is trouble, not absence."""
        return bool(self._seen)

    def read(self, pids: Mapping[str, Iterable[int]]) -> tuple[tuple[DeviceReading, ...], str]:
        """What answers now, and a sentence about what does not ("" = all well). Never raises."""
        now = self._clock()
        if now >= self._retry_at and (not self._open or self._why):
            self._reopen()
        if not self._open:
            return (), self._why
        owner = {pid: who for who, members in pids.items() for pid in members}
        readings: list[DeviceReading] = []
        troubles: list[str] = []
        try:
            count = int(self._lib.nvmlDeviceGetCount())
        except Exception as error:
            count = 0
            troubles.append(f"cannot read the GPUs: {self._explain(error)}")
        for index in range(count):
            try:
                readings += self._device(index, owner)
            except Exception as error:
                troubles.append(f"cannot read GPU {index}: {self._explain(error)}")
        self._seen |= {r.id: Label(f"{r.kind.upper()} {r.index} ({r.name})", r.id) for r in readings}
        if not troubles:
            silent = [label.text for key, label in self._seen.items() if key not in {r.id for r in readings}]
            if silent:
                troubles.append(f"{', '.join(silent)} is gone (see nvidia-smi and dmesg)")
        self._settle("; ".join(troubles), now)
        return tuple(readings), self._why

    def close(self) -> None:
        """Let go of the library."""
        if self._open:
            self._open = False
            with contextlib.suppress(Exception):
                self._lib.nvmlShutdown()

    def _reopen(self) -> None:
        """Open the library, anew if it was open: handles do not survive a reset."""
        self.close()
        try:
            self._lib = importlib.import_module(self._source) if isinstance(self._source, str) else self._source
            self._lib.nvmlInit()
        except ImportError as error:
            self.missing = True
            self._settle(f"cannot load {self._source}: {error}", self._clock())
        except Exception as error:
            self.missing = self._name(error) == "LIBRARY_NOT_FOUND"
            self._settle(f"cannot open NVML: {self._explain(error)}", self._clock())
        else:
            self._open, self.missing, self._why = True, False, ""

    def _settle(self, why: str, now: float) -> None:
        """Note how it went. After trouble NVML is opened anew when the pause is over, each time a longer one."""
        self._why = why
        if not why:
            self._pause = PAUSE
        elif now >= self._retry_at:
            self._retry_at = now + self._pause
            self._pause = min(self._pause * 2, PAUSE_MAX)

    def _device(self, index: int, owner: Mapping[int, str]) -> list[DeviceReading]:
        """The GPU at `index`, or its slices when it is cut up. Raises NVMLError."""
        lib = self._lib
        handle = lib.nvmlDeviceGetHandleByIndex(index)
        if not self._sliced(handle):
            return [self._reading(handle, "gpu", index, owner)]
        readings = []
        for slot in range(int(lib.nvmlDeviceGetMaxMigDeviceCount(handle))):
            try:
                piece = lib.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
            except lib.NVMLError as error:
                if self._name(error) in ("NOT_FOUND", "INVALID_ARGUMENT"):
                    continue  # slots need not be filled in order
                raise
            # A number of its own, apart from those of whole GPUs: slices of GPU 0 are 100, 101, ...; of GPU 1 200, ...
            readings.append(self._reading(piece, "mig", (index + 1) * 100 + slot, owner))
        return readings

    def _sliced(self, handle: Any) -> bool:
        try:
            return bool(self._lib.nvmlDeviceGetMigMode(handle)[0])
        except self._lib.NVMLError as error:
            if self._name(error) in ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND"):
                return False
            raise

    def _reading(self, handle: Any, kind: str, index: int, owner: Mapping[int, str]) -> DeviceReading:
        lib = self._lib
        memory = lib.nvmlDeviceGetMemoryInfo(handle)
        total, used, free = int(memory.total), int(memory.used), int(memory.free)
        graphics = self._processes(lib.nvmlDeviceGetGraphicsRunningProcesses, handle)
        listed = merge(self._processes(lib.nvmlDeviceGetComputeRunningProcesses, handle), graphics)
        sizes = fill(listed, used)
        instances: dict[str, int] = {}
        for pid, size in sizes.items():
            if pid in owner:
                instances[owner[pid]] = instances.get(owner[pid], 0) + size
        others = sorted(((size, pid) for pid, size in sizes.items() if pid not in owner), reverse=True)
        shown = sum(sizes[pid] for pid in graphics if pid not in owner)
        return DeviceReading(
            id=text(lib.nvmlDeviceGetUUID(handle)),
            kind=kind,
            index=index,
            name=text(lib.nvmlDeviceGetName(handle)),
            total=total,
            used=used,
            engine_total=total,
            engine_free=free,
            display=max(1, shown) if self._displays(handle) else 0,
            instances=instances,
            external=max(0, used - sum(instances.values())),
            processes=tuple(Holder(pid, self._process_name(pid), size) for size, pid in others[:NAMED]),
        )

    def _processes(self, ask: Callable[[Any], Any], handle: Any) -> dict[int, int | None]:
        """Bytes by pid; None where NVML may not say. One pid can stand there twice (several compute instances)."""
        try:
            rows = ask(handle)
        except self._lib.NVMLError as error:
            if self._name(error) in ("NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND"):
                return {}  # graphics on a slice, processes in some virtual machines: memory is still known
            raise
        found: dict[int, int | None] = {}
        for row in rows:
            known, size = found.get(row.pid), row.usedGpuMemory
            found[row.pid] = known if size is None else size + (known or 0)
        return found

    def _displays(self, handle: Any) -> bool:
        try:
            return bool(self._lib.nvmlDeviceGetDisplayActive(handle))
        except self._lib.NVMLError:
            return False  # slices and data-centre cards have no such thing

    def _process_name(self, pid: int) -> str:
        try:
            return (self._proc / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return f"pid {pid}"

    def _name(self, error: BaseException) -> str:
        """NVML's name of an error: "GPU_IS_LOST"; "" for any other exception."""
        code = getattr(error, "value", None)
        names = (name for name in dir(self._lib) if name.startswith("NVML_ERROR_") and getattr(self._lib, name) == code)
        return next(names, "").removeprefix("NVML_ERROR_") if code is not None else ""

    def _explain(self, error: BaseException) -> str:
        """What the error says, and what to do about it where we know."""
        advice = ADVICE.get(self._name(error), "")
        said = str(error) or type(error).__name__
        return f"{said} ({advice})" if advice else said


def merge(compute: Mapping[int, int | None], graphics: Mapping[int, int | None]) -> dict[int, int | None]:
    """All processes. One that computes and draws stands in both lists, each time with all its memory."""
    both = dict(compute)
    for pid, size in graphics.items():
        known = both.get(pid)
        both[pid] = size if known is None else known if size is None else max(known, size)
    return both


def fill(listed: Mapping[int, int | None], used: int) -> dict[int, int]:
    """Sizes for all: where NVML does not say (WSL, some containers) the unexplained rest is shared out evenly, so that
    an instance is not taken for a stranger's memory."""
    known = sum(size for size in listed.values() if size is not None)
    unknown = sum(size is None for size in listed.values())
    each = max(0, used - known) // unknown if unknown else 0
    return {pid: each if size is None else size for pid, size in listed.items()}


def text(value: Any) -> str:
    """NVML's strings were bytes in older bindings."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
