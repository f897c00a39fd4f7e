"""vllmd/edge/devices, nvml, ram: what a look at the devices says, and that it goes on when a device does not answer."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.edge.devices import Devices
from vllmd.edge.ram import SCAN_EVERY, Ram, engine_node, find_groups, id_list
from vllmd.events import DevicesRead
from vllmd.facts import DeviceReading
from vllmd.units import GIB, MIB


class NVMLError(Exception):
    """As pynvml's: a code and a text."""

    def __init__(self, value: int, said: str = "") -> None:
        super().__init__(said or f"NVML error {value}")
        self.value = value


@dataclass
class Card:
    """A GPU, or a slice of one. Sizes in MiB; `compute` and `graphics` are (pid, MiB or None)."""

    uuid: str
    used: int = 0
    total: int = 24576
    compute: list[tuple[int, int | None]] = field(default_factory=list)
    graphics: list[tuple[int, int | None]] = field(default_factory=list)
    display: bool = False
    slices: dict[int, "Card"] = field(default_factory=dict)
    error: int | None = None


class FakeNvml:
    """A stand-in for the module pynvml."""

    NVMLError = NVMLError
    NVML_ERROR_UNINITIALIZED = 1
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    def __init__(self, *cards: Card) -> None:
        self.cards = list(cards)
        self.broken: int | None = None
        self.opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1
        if self.broken:
            raise NVMLError(self.broken)

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        if self.broken:
            raise NVMLError(self.broken)
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        card = self.cards[index]
        if card.error:
            raise NVMLError(card.error, "GPU is lost")
        return card

    def nvmlDeviceGetMigMode(self, card: Card) -> tuple[int, int]:
        if card.display:
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return (int(bool(card.slices)),) * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, slot: int) -> Card:
        if slot not in card.slices:
            raise NVMLError(self.NVML_ERROR_NOT_FOUND)
        return card.slices[slot]

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        return SimpleNamespace(total=card.total * MIB, used=card.used * MIB, free=(card.total - card.used) * MIB)

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> bytes:
        return b"NVIDIA L4"

    def nvmlDeviceGetDisplayActive(self, card: Card) -> int:
        return int(card.display)

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=mib and mib * MIB) for pid, mib in card.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: Card) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=mib and mib * MIB) for pid, mib in card.graphics]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def gpus(tmp_path: Path, fake: FakeNvml, clock: Clock | None = None) -> Devices:
    """Devices over a fake NVML, on a machine whose PCI bus is empty."""
    return Devices(fake, sys=tmp_path, clock=clock or Clock())


OURS = {"ocr": frozenset({11, 12}), "vlm": frozenset({21})}


def test_two_gpus_are_read_by_index_and_uuid(tmp_path: Path) -> None:
    """Every GPU is a device with its sizes in bytes."""
    fake = FakeNvml(Card("GPU-a", 1000), Card("GPU-b", 2000))
    read = gpus(tmp_path, fake).read({})
    assert [(d.id, d.kind, d.index, d.used) for d in read.devices] == [
        ("GPU-a", "gpu", 0, 1000 * MIB),
        ("GPU-b", "gpu", 1, 2000 * MIB),
    ]
    assert read.devices[0].name == "NVIDIA L4"
    assert read.devices[0].engine_free == (24576 - 1000) * MIB
    assert read.trouble == ""


def test_use_is_split_into_ours_and_external(tmp_path: Path) -> None:
    """An instance's part is the sum over its pids; the rest is external, with its largest processes named."""
    card = Card("GPU-a", 9000, compute=[(11, 3000), (12, 500), (21, 4000), (os.getpid(), 1000)])
    device = gpus(tmp_path, FakeNvml(card)).read(OURS).devices[0]
    assert device.instances == {"ocr": 3500 * MIB, "vlm": 4000 * MIB}
    assert device.external == 1500 * MIB
    assert [(p.pid, p.used) for p in device.processes] == [(os.getpid(), 1000 * MIB)]
    assert device.processes[0].name == Path("/proc/self/comm").read_text().strip()


def test_a_process_that_computes_and_draws_counts_once(tmp_path: Path) -> None:
    """NVML lists such a process twice, each time with all its memory."""
    card = Card("GPU-a", 900, compute=[(77, 300)], graphics=[(77, 300), (78, 200)])
    device = gpus(tmp_path, FakeNvml(card)).read({}).devices[0]
    assert {p.pid: p.used for p in device.processes} == {77: 300 * MIB, 78: 200 * MIB}


def test_one_pid_in_several_compute_instances_is_summed(tmp_path: Path) -> None:
    """The rows of one list are parts of a process's memory."""
    device = gpus(tmp_path, FakeNvml(Card("GPU-a", 900, compute=[(11, 300), (11, 200)]))).read(OURS).devices[0]
    assert device.instances == {"ocr": 500 * MIB}


def test_unsaid_process_memory_is_shared_out(tmp_path: Path) -> None:
    """Where NVML may not say a process's memory, what nobody explains is theirs in equal parts."""
    card = Card("GPU-a", 9000, compute=[(11, None), (21, None), (99, 1000)])
    device = gpus(tmp_path, FakeNvml(card)).read(OURS).devices[0]
    assert device.instances == {"ocr": 4000 * MIB, "vlm": 4000 * MIB}
    assert device.external == 1000 * MIB


def test_a_display_counts_what_is_drawn(tmp_path: Path) -> None:
    """With a display attached, the bytes of graphics processes are told; without, none."""
    shown = Card("GPU-a", 800, graphics=[(5, 300), (6, 100)], display=True)
    bare = Card("GPU-b", 800, graphics=[(5, 300)])
    devices = gpus(tmp_path, FakeNvml(shown, bare)).read({}).devices
    assert [d.display for d in devices] == [400 * MIB, 0]


def test_slices_are_devices_in_place_of_their_gpu(tmp_path: Path) -> None:
    """A GPU that is cut up is its slices, each with its own number, UUID and processes."""
    cut = Card("GPU-a", slices={0: Card("MIG-x", 100, 5000, [(11, 90)]), 3: Card("MIG-y", 200, 5000)})
    devices = gpus(tmp_path, FakeNvml(cut, Card("GPU-b"))).read(OURS).devices
    assert [(d.id, d.kind, d.index) for d in devices] == [
        ("MIG-x", "mig", 100),
        ("MIG-y", "mig", 103),
        ("GPU-b", "gpu", 1),
    ]
    assert devices[0].instances == {"ocr": 90 * MIB}


def test_a_lost_gpu_leaves_the_others(tmp_path: Path) -> None:
    """One GPU that fails is missing from the reading and named in the trouble, with what to do."""
    fake = FakeNvml(Card("GPU-a"), Card("GPU-b"))
    devices = gpus(tmp_path, fake)
    devices.read({})
    fake.cards[1].error = fake.NVML_ERROR_GPU_IS_LOST
    read = devices.read({})
    assert [d.id for d in read.devices] == ["GPU-a"]
    assert "GPU 1" in read.trouble and "GPU is lost" in read.trouble and "reboot" in read.trouble


def test_a_gpu_that_is_counted_no_more_is_missed_by_name(tmp_path: Path) -> None:
    """A card that NVML forgot after it fell off the bus is still known to us."""
    fake = FakeNvml(Card("GPU-a"), Card("GPU-b"))
    devices = gpus(tmp_path, fake)
    devices.read({})
    fake.cards.pop()
    read = devices.read({})
    assert [d.id for d in read.devices] == ["GPU-a"]
    assert read.trouble.startswith("GPU 1 (NVIDIA L4) is gone")


def test_vanished_nvml_is_never_taken_for_a_cpu_machine(tmp_path: Path) -> None:
    """A driver update under a running daemon: no device answers, the reason is said, and RAM does not appear."""
    fake, clock = FakeNvml(Card("GPU-a")), Clock()
    devices = gpus(tmp_path, fake, clock)
    devices.read({})
    fake.broken = fake.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    for _ in range(5):
        read = devices.read({})
        assert read.devices == () and "driver was updated" in read.trouble
        clock.now += 100


def test_nvml_is_opened_anew_with_growing_pauses(tmp_path: Path) -> None:
    """While it fails, NVML is not opened at every look; when it is back, everything is read again."""
    fake, clock = FakeNvml(Card("GPU-a")), Clock()
    devices = gpus(tmp_path, fake, clock)
    devices.read({})
    fake.broken = fake.NVML_ERROR_UNINITIALIZED
    opened = []
    for _ in range(40):
        devices.read({})
        opened.append(fake.opened)
        clock.now += 1
    assert fake.opened - 1 <= 6  # after 1, 2, 4, 8, 16 s
    fake.broken = None
    clock.now += 60
    read = devices.read({})
    assert [d.id for d in read.devices] == ["GPU-a"] and read.trouble == ""


def test_without_a_library_there_is_one_cpu(tmp_path: Path) -> None:
    """No NVIDIA library: the machine's memory is the device, without trouble, and stays it."""
    fake = FakeNvml(Card("GPU-a"))
    fake.broken = fake.NVML_ERROR_LIBRARY_NOT_FOUND
    devices = gpus(tmp_path, fake)
    assert [d.id for d in devices.read({}).devices] == ["cpu"]
    fake.broken = None
    assert [d.id for d in devices.read({}).devices] == ["cpu"]


def test_a_card_without_a_driver_is_trouble_from_the_start(tmp_path: Path) -> None:
    """An NVIDIA card sits on the bus but its driver is not loaded: that is no CPU machine."""
    slot = tmp_path / "bus/pci/devices/0000:01:00.0"
    slot.mkdir(parents=True)
    (slot / "vendor").write_text("0x10de\n")
    (slot / "class").write_text("0x030000\n")
    fake = FakeNvml()
    fake.broken = fake.NVML_ERROR_DRIVER_NOT_LOADED
    read = gpus(tmp_path, fake).read({})
    assert read.devices == () and "modprobe nvidia" in read.trouble


def test_the_module_can_be_named_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLMD_NVML=none makes any machine a CPU machine."""
    monkeypatch.setenv("VLLMD_NVML", "none")
    assert [d.kind for d in Devices().read({}).devices] == ["cpu"]


# -- the machine's memory ---------------------------------------------------------------------------------------------

HOLD = """
import mmap, sys
size = int(sys.argv[1])
held = b"x" * size
file = open(sys.argv[2], "r+b")
view = mmap.mmap(file.fileno(), 0)
sum(view[::4096])
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """A child that holds 64 MiB of its own and has 64 MiB of a file mapped; its pid."""
    mapped = tmp_path / "weights"
    mapped.write_bytes(bytes(64 * MIB))
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(64 * MIB), str(mapped)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout and child.stdout.readline() == b"holding\n"
    yield child.pid
    child.communicate()


def only(read: DevicesRead) -> DeviceReading:
    assert len(read.devices) == 1 and read.trouble == ""
    return read.devices[0]


def test_cpu_counts_private_memory_of_real_processes(holder: int, tmp_path: Path) -> None:
    """What a child allocated is its instance's; a file it has mapped is page cache and nobody's."""
    device = only(Devices("none").read({"m": frozenset({holder})}))
    assert 64 * MIB <= device.instances["m"] < 64 * MIB + 32 * MIB
    assert device.kind == device.id == "cpu" and device.name
    assert 0 <= device.external == max(0, device.used - device.instances["m"])
    assert device.total >= device.used > 0
    assert device.engine_total >= device.engine_free > 0


def test_others_are_named_and_ours_are_not(holder: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is a large stranger until it is ours, even within one scan of the machine."""
    assert len(Ram().read({}).processes) <= 8
    monkeypatch.setattr("vllmd.edge.ram.NAMED", 10_000)
    ram = Ram()
    assert holder in {p.pid for p in ram.read({}).processes}
    assert holder not in {p.pid for p in ram.read({"m": [holder]}).processes}


def test_a_process_that_vanished_is_skipped() -> None:
    """A pid that is gone uses nothing and disturbs nobody."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    device = only(Devices("none").read({"m": frozenset({child.pid}), "me": frozenset({os.getpid()})}))
    assert "m" not in device.instances and device.instances["me"] > 0


def test_no_descriptor_is_left_open(holder: int) -> None:
    """A look opens and closes."""
    devices = Devices("none")
    devices.read({"m": frozenset({holder})})
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        devices.read({"m": frozenset({holder, 2**22 - 1})})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_all_processes_are_scanned_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan of the whole machine is at most every 30 s; a look between reads only what is ours."""
    clock, scans = Clock(), []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: scans.append(path) or listdir(path))
    ram = Ram(clock=clock)
    for _ in range(int(2 * SCAN_EVERY)):
        ram.read({})
        clock.now += 1
    assert len(scans) == 2


def machine(tmp_path: Path, limits: dict[str, str], *, node_kib: int = 16 << 20) -> tuple[Path, Path]:
    """A /proc and a /sys of 32 GiB with 24 free, our group at /top/inner, and the given cgroup files."""
    proc, sys_ = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {32 << 20} kB\nMemFree: {20 << 20} kB\nMemAvailable: {24 << 20} kB\n")
    (proc / "self/status").write_text("Name:\tvllmd\nMems_allowed_list:\t0\n")
    (proc / "self/cgroup").write_text("0::/top/inner\n")
    (proc / "self/mountinfo").write_text(f"30 20 0:26 / {sys_}/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (sys_ / "fs/cgroup/top/inner").mkdir(parents=True)
    for name, value in limits.items():
        (sys_ / "fs/cgroup" / name).write_text(value)
    node = sys_ / "devices/system/node/node0"
    node.mkdir(parents=True)
    (node / "meminfo").write_text(
        f"Node 0 MemTotal: {node_kib} kB\nNode 0 MemFree: {8 << 20} kB\n"
        f"Node 0 Active(file): {1 << 20} kB\nNode 0 Inactive(file): {1 << 20} kB\nNode 0 SReclaimable: {1 << 20} kB\n"
    )
    return proc, sys_


def test_a_group_above_ours_limits_us(tmp_path: Path) -> None:
    """The smallest limit on the way up counts; page cache inside the group is not in use."""
    limits = {
        "top/inner/memory.max": "max",
        "top/memory.max": str(8 * GIB),
        "top/memory.current": str(5 * GIB),
        "top/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file {GIB}\n",
    }
    device = Ram(*machine(tmp_path, limits)).read({})
    assert device.total == 8 * GIB
    assert device.used == 3 * GIB


def test_the_engine_sees_one_node(tmp_path: Path) -> None:
    """vLLM's CPU worker counts its NUMA node: free, file pages and reclaimable slabs."""
    device = Ram(*machine(tmp_path, {})).read({})
    assert (device.total, device.engine_total, device.engine_free) == (32 * GIB, 16 * GIB, 11 * GIB)


def test_the_engine_is_clamped_by_the_outermost_group(tmp_path: Path) -> None:
    """As in a container: its limit, and what is left of it."""
    limits = {"memory.max": str(6 * GIB), "memory.current": str(2 * GIB)}
    device = Ram(*machine(tmp_path, limits)).read({})
    assert (device.engine_total, device.engine_free) == (6 * GIB, 4 * GIB)
    assert device.total == 6 * GIB


def test_an_old_memory_group_is_found(tmp_path: Path) -> None:
    """cgroup v1: the controller's own mount, whose root may be our container's group."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    mount = tmp_path / "memory"
    (mount / "job").mkdir(parents=True)
    (proc / "self/cgroup").write_text("5:cpuset:/\n4:memory:/box/job\n0::/\n")
    (proc / "self/mountinfo").write_text(f"35 31 0:32 /box {mount} rw - cgroup cgroup rw,memory\n")
    assert [group.limit for group in find_groups(proc)] == [
        mount / "job/memory.limit_in_bytes",
        mount / "memory.limit_in_bytes",
    ]


def test_unreadable_memory_is_trouble_not_an_error(tmp_path: Path) -> None:
    """Without /proc there is no reading, and a sentence."""
    read = Devices("none", proc=tmp_path, sys=tmp_path).read({})
    assert read.devices == () and "cannot read the machine's memory" in read.trouble


def test_engine_node_of_this_machine_exists() -> None:
    """The node is one whose memory we may use."""
    allowed = [li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("Mems_allowed_list")]
    assert engine_node(Path("/proc"), Path("/sys")) in id_list(allowed[0].split()[1])
    assert id_list("0-2,5") == {0, 1, 2, 5}
