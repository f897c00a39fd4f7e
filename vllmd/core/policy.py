"""Rules as pure functions of values: how long to back off, when enough is enough, when an engine counts as hung."""

import hashlib
from collections.abc import Sequence

from vllmd.spec import RestartRule

#: How much longer than its base a backoff may be, so that models that died together do not start together.
JITTER = 0.1


def backoff(rule: RestartRule, failures: int, seed: str) -> float:
    """Seconds to wait after the `failures`-th failure (1 = first): base doubled each time, capped, plus up to 10 %.

    The jitter comes from a hash of `seed`, so that the same story gives the same answer.
    """
    base = min(rule.backoff * 2.0 ** min(failures - 1, 32), rule.backoff_max)
    fraction = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "big") / 2**32
    return base * (1.0 + JITTER * fraction)


def recent(failures: Sequence[float], rule: RestartRule, now: float) -> list[float]:
    """The failures that still count: those within the window."""
    return [at for at in failures if now - at < rule.window]


def canary_due(proved: float, hang_after: float) -> float:
    """When an engine that showed nothing since `proved` should be asked for a token: half-way to being called hung, so
    that a freeze right after a proof is found within `hang_after` of it."""
    return proved + hang_after / 2


def hung_at(proved: float, asked: float, hang_after: float) -> float:
    """When an engine that showed no progress since `proved`, and has not answered what it was `asked`, counts as hung. It
    has had half of the time for its answer, whoever slept meanwhile."""
    return max(proved + hang_after, asked + hang_after / 2)
