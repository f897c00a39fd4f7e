"""The memory budget: what each device offers, what is promised to whom, and whether one more fits. Arithmetic only.

    budget = min(total - reserve, limit)
    left   = min(budget - promised, total - reserve - external - sum of max(promised, used))

`limit` caps what vllmd takes; other programs count only against what is physically there. An instance that uses more
than it was promised counts with what it uses. What an instance that is being ended used and the device still shows as
used by nobody is its own until its promise is given back: it does not count twice.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from vllmd.facts import DeviceReading
from vllmd.spec import DeviceRule
from vllmd.units import GIB, MIB, gib, gib_of

AUTO_RESERVE = 512 * MIB
DISPLAY_RESERVE = GIB  # beside what the display itself uses now: desktops grow


@dataclass(frozen=True, slots=True)
class Account:
    """One device's sums at this moment, in bytes."""

    reading: DeviceReading
    reserve: int
    budget: int
    promised: Mapping[str, int]
    external: int
    returning: Mapping[str, int] = field(default_factory=dict)  # of instances that are being ended: not yet given back
    claimed: int = 0  # what is there, but was freed for another who waits
    claimants: tuple[str, ...] = ()
    lent: int = 0  # lent to something else, which does not use it yet

    @property
    def reserved(self) -> int:
        return sum(self.promised.values())

    @property
    def left(self) -> int:
        """Bytes that one more instance could be promised; negative when others took what was promised."""
        return min(self.budget - self.reserved, self.untaken) - self.claimed

    @property
    def untaken(self) -> int:
        """Bytes that are physically there and neither promised nor used by anybody."""
        used = self.reading.instances
        taken = sum(max(size, used.get(who, 0)) for who, size in self.promised.items())
        # Trees whose promise is gone while a process lingers are neither external nor promised.
        taken += sum(size for who, size in used.items() if who not in self.promised)
        return self.reading.total - self.reserve - self.external - self.lent - taken

    @property
    def label(self) -> str:
        """How sentences name it: "GPU 0" or "cpu"."""
        return device_label(self.reading)


@dataclass(slots=True)
class Loan:
    """Bytes of a device that are lent to something else until `until`; `before`: what others used when it was given."""

    device: str
    size: int
    until: float
    before: int


@dataclass(slots=True)
class Ledger:
    """Promises by instance and device. Only the core touches it; `readings` is the last look at each device."""

    rules: Mapping[str, DeviceRule] = field(default_factory=dict)
    readings: dict[str, DeviceReading] = field(default_factory=dict)
    held: dict[str, dict[str, int]] = field(default_factory=dict)
    leaving: dict[str, dict[str, DeviceReading]] = field(default_factory=dict)  # the devices when an end began
    loans: list[Loan] = field(default_factory=list)

    def account(self, device: str) -> Account:
        """The sums of one device. Raises KeyError for a device that was never seen."""
        reading = self.readings[device]
        rule = rule_for(reading, self.rules)
        reserve = auto_reserve(reading) if rule.reserve is None else rule.reserve
        returning = self._returning(reading) if self.leaving else {}
        # With a display attached its own use is already inside the automatic reserve.
        inside = reading.display if rule.reserve is None else 0
        external = max(0, reading.external - sum(returning.values()) - inside)
        budget = max(0, reading.total - reserve)
        if rule.limit is not None:
            budget = min(budget, rule.limit)
        promised = {who: part[device] for who, part in self.held.items() if device in part}
        loans = [loan for loan in self.loans if loan.device == device]
        lent = max(0, sum(loan.size for loan in loans) - max(0, external - loans[0].before)) if loans else 0
        return Account(reading, reserve, budget, promised, external, returning, lent=lent)

    def leave(self, instance: str, devices: Iterable[str]) -> None:
        """The instance's end begins: what its devices show now tells later what has come back."""
        now = {device: self.readings[device] for device in devices if device in self.readings}
        self.leaving[instance] = {
            device: replace(reading, external=reading.external - sum(self._returning(reading).values()))
            for device, reading in now.items()
        }

    def _returning(self, reading: DeviceReading) -> dict[str, int]:
        """By instance: what others use more than when its end began and no other program explains, up to what it was
        promised and is not seen to use."""
        found: dict[str, int] = {}
        rest = reading.external
        for who, before in self.leaving.items():
            if reading.id not in before:
                continue
            missing = self.held.get(who, {}).get(reading.id, 0) - reading.instances.get(who, 0)
            back = max(0, min(missing, rest - before[reading.id].external - growth(before[reading.id], reading)))
            found[who] = back
            rest -= back
        return found

    def hold(self, instance: str, parts: Mapping[str, int]) -> None:
        """Promise `parts` (device -> bytes) to an instance, in place of what it had. Raises if it does not fit."""
        self.release(instance)
        for device, size in parts.items():
            account = self.account(device)
            if size > account.left:
                raise ValueError(f"cannot hold {size} bytes on {device} for {instance}: {account.left} left")
        self.held[instance] = dict(parts)

    def widen(self, instance: str, parts: Mapping[str, int]) -> None:
        """Promise more to an instance that has its part already and uses it. Raises if what is new does not fit."""
        held = self.held.get(instance, {})
        for device, size in parts.items():
            more = size - held.get(device, 0)
            if more > max(0, self.account(device).left):
                raise ValueError(f"cannot hold {more} bytes more on {device} for {instance}")
        self.held[instance] = dict(parts)

    def recall(self, instance: str, parts: Mapping[str, int]) -> None:
        """Restore the promise to an engine that was adopted. It has its memory: there is nothing to ask."""
        self.held[instance] = dict(parts)

    def release(self, instance: str) -> None:
        """Take back all promises to an instance; none is fine."""
        self.held.pop(instance, None)
        self.leaving.pop(instance, None)


def growth(before: DeviceReading, after: DeviceReading) -> int:
    """Bytes that other programs, by name, use more than before."""
    known = {(p.pid, p.name): p.used for p in before.processes}
    return sum(max(0, p.used - known.get((p.pid, p.name), 0)) for p in after.processes)


def rule_for(reading: DeviceReading, rules: Mapping[str, DeviceRule]) -> DeviceRule:
    """What is set for a device, key by key: by its id (UUID), else by its index, else by "*"."""
    found = [rules[key] for key in (reading.id, str(reading.index), "*") if key in rules]
    reserve = next((rule.reserve for rule in found if rule.reserve is not None), None)
    return DeviceRule(reserve, next((rule.limit for rule in found if rule.limit is not None), None))


def auto_reserve(reading: DeviceReading) -> int:
    """What is kept back when nobody said: 512 MiB, with a display attached what it uses + 1 GiB."""
    return reading.display + DISPLAY_RESERVE if reading.display else AUTO_RESERVE


def device_label(reading: DeviceReading) -> str:
    """ "GPU 0", "MIG 1", or "cpu"."""
    return "cpu" if reading.kind == "cpu" else f"{reading.kind.upper()} {reading.index}"


def takers(account: Account, count: int = 4) -> str:
    """Who has the memory of a device, largest first: "dots-ocr 9.8 GiB, Xorg 0.5 GiB". Under a limit that is tighter than
    what is there, other programs take nothing from it and are not named."""
    used = account.reading.instances
    rows = [(max(size, used.get(who, 0)), who) for who, size in account.promised.items()]
    if account.untaken <= account.budget - account.reserved:
        rows += [(p.used, p.name) for p in account.reading.processes if p.used >= 64 * MIB]
    if account.lent:
        rows.append((account.lent, "lent"))
    if account.claimed:
        rows.append((account.claimed, f"kept for {', '.join(account.claimants)}"))
    rows.sort(reverse=True)
    named = [f"{who} {gib(size)}" for size, who in rows[:count]]
    rest = sum(size for size, _ in rows[count:])
    return ", ".join([*named, f"{len(rows) - count} more {gib(rest)}"] if rest else named) or "nothing else is running"


def memory_sum(account: Account) -> str:
    """One device's sum as a sentence part: "GPU 0: 1.1 of 11.4 GiB left: dots-ocr 9.8 GiB, Xorg 0.5 GiB"."""
    return f"{account.label}: {gib_of(max(0, account.left), account.budget)} left: {takers(account)}"


def smallest_release(account: Account, need: int, candidates: Iterable[str]) -> tuple[str, ...]:
    """The fewest of `candidates` whose stopping makes room for `need` bytes, smallest that suffice; () = none do."""
    missing = need - account.left
    parts = sorted((account.promised.get(who, 0), who) for who in candidates if account.promised.get(who, 0) > 0)
    alone = [who for size, who in parts if size >= missing]
    if alone:
        return (alone[0],)
    chosen: list[str] = []
    for size, who in reversed(parts):
        chosen.append(who)
        missing -= size
        if missing <= 0:
            return tuple(chosen)
    return ()
