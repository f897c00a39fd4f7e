"""The benchmarks' own arithmetic, and that the core's script of events still runs."""

import pytest

from tests.bench.bench_core import live
from tests.bench.figures import Figure, at_most, middle, table


@pytest.mark.parametrize(("part", "value"), [(0.5, 10), (0.95, 19), (1.0, 20), (0.01, 1)])
def test_quantile_is_one_of_the_values(part: float, value: float) -> None:
    """The nearest rank: of 20, 19 are at most the 95th percentile."""
    assert at_most(list(range(20, 0, -1)), part) == value


def test_verdict_follows_the_target() -> None:
    """The target itself is still good; a figure without one is not judged."""
    assert [Figure("", 1.0, "s", target).verdict for target in (1.0, 0.9, None)] == ["ok", "over", ""]


def test_table_shows_value_and_target_in_one_unit() -> None:
    """Seconds become what the figure is told in, the target already is."""
    row = table([middle("a start", [0.010, 0.012, 0.5], "ms", 90.0)]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:5]] == ["a start", "12.0 ms", "90.0 ms", "ok"]


def test_core_lives_through_the_script() -> None:
    """Every kind of report is among its events, and all models are up at the end."""
    assert set(live(10).took) >= {"Progress", "Ready", "Pulse", "DevicesRead", "Broken", "Gone", "Stop", "CanaryBack"}
