"""The devices that models run on: NVIDIA GPUs, or without any the machine's memory as the one device "cpu".

Which of the two is settled by the first look and then stays: a machine whose driver fails has silent GPUs, it has not
become a machine without. A driver that cannot be opened although a card sits on the bus is trouble from the start.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllmd.edge.nvml import Nvml
from vllmd.edge.ram import Ram
from vllmd.events import DevicesRead

#: Names the module to use in place of pynvml. One that does not exist ("none") makes a GPU machine a CPU machine.
MODULE = "VLLMD_NVML"


class Devices:
    """Reads all devices. `read` blocks for some milliseconds and is to be called by one thread at a time."""

    def __init__(
        self,
        module: str | Any = None,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = Nvml(module or os.environ.get(MODULE) or "pynvml", proc, clock)
        self._ram = Ram(proc, sys, clock)
        self._sys = sys
        self._gpus: bool | None = None

    def read(self, pids: Mapping[str, frozenset[int]]) -> DevicesRead:
        """One look at everything; `pids` are each instance's processes. Never raises: `trouble` says what is amiss."""
        if self._gpus is not False:
            readings, trouble = self._nvml.read(pids)
            if self._gpus is None:
                self._gpus = bool(readings) or (not self._nvml.missing and self._card_present())
            if self._gpus:
                return DevicesRead(readings, trouble)
        try:
            return DevicesRead((self._ram.read(pids),))
        except (OSError, KeyError, ValueError) as error:
            return DevicesRead((), f"cannot read the machine's memory: {error} (is /proc mounted?)")

    def close(self) -> None:
        """Let go of NVML."""
        self._nvml.close()

    def _card_present(self) -> bool:
        """Whether the PCI bus has a display or compute controller of NVIDIA's."""
        for folder in (self._sys / "bus/pci/devices").glob("*"):
            try:
                vendor, kind = (folder / "vendor").read_text().strip(), (folder / "class").read_text().strip()
            except OSError:
                continue
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
        return False
