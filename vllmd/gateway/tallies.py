"""What the gateway counts since the daemon started, for /metrics. In memory; a request costs a few additions."""

from collections import defaultdict
from dataclasses import dataclass, field


def _counts() -> "defaultdict[tuple[str, str], int]":
    return defaultdict(int)


@dataclass(slots=True)
class Counted:
    """By (model, what): answers by class of their status ("2xx", "gone": the client left), refusals by code; retries and
    seconds in line by model. `memory`: bytes of requests that are held now."""

    answers: "defaultdict[tuple[str, str], int]" = field(default_factory=_counts)
    refusals: "defaultdict[tuple[str, str], int]" = field(default_factory=_counts)
    retries: "defaultdict[str, int]" = field(default_factory=lambda: defaultdict(int))
    waits: "defaultdict[str, int]" = field(default_factory=lambda: defaultdict(int))
    wait_seconds: "defaultdict[str, float]" = field(default_factory=lambda: defaultdict(float))
    memory: int = 0
