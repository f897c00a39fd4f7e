"""/metrics: true, complete in every state, and readable by Prometheus' own parser."""

from prometheus_client.parser import text_string_to_metric_families

from tests.stub_backend import GIB, Stub, model
from vllmd.core.states import State
from vllmd.edge.backend import Tallies
from vllmd.edge.metrics import STATES, render

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(stub: Stub) -> Samples:
    """All samples by name and labels."""
    families = text_string_to_metric_families(render(stub).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_the_states_are_those_of_the_core() -> None:
    """No state is without its series."""
    assert set(STATES) == set(State)


def test_a_model_is_in_one_state() -> None:
    """vllmd_model_state is 1 for the state and 0 for all others."""
    samples = scrape(Stub())
    found = {k[1][1][1]: v for k, v in samples.items() if k[0] == "vllmd_model_state" and k[1][0][1] == "alpha"}
    assert found == {state: float(state == "ready") for state in STATES}


def test_devices_and_models_are_shown_in_bytes() -> None:
    """The figures are those of the status."""
    samples = scrape(Stub())
    assert samples["vllmd_device_budget_bytes", (("device", "GPU-1"), ("index", "0"))] == 11 * GIB
    assert samples["vllmd_device_external_bytes", (("device", "GPU-1"), ("index", "0"))] == GIB // 2
    assert samples["vllmd_model_reserved_bytes", (("model", "alpha"),)] == 6 * GIB
    assert samples["vllmd_model_requests_running", (("model", "alpha"),)] == 3
    assert samples["vllmd_model_need_bytes", (("model", "b.e-t_a"),)] == 0
    assert samples["vllmd_model_tokens_per_second", (("model", "alpha"),)] == 412.5


def test_the_series_of_a_model_are_the_same_in_every_state() -> None:
    """A stopped model loses no series: graphs and alerts go on."""
    stub = Stub()
    seen = []
    for state in STATES:
        stub.value["models"] = [model("m", state, need=None if state == "stopped" else GIB)]
        seen.append({key for key in scrape(stub) if ("model", "m") in key[1]})
    assert all(keys == seen[0] for keys in seen)
    assert len(seen[0]) == len(STATES) + 7 + 6  # gauges, counters


def test_what_is_counted_beside_the_status() -> None:
    """Restarts by class, start times by phase, hangs and overruns."""
    stub = Stub()
    stub.counted = Tallies({("alpha", "hung"): 2}, {("alpha", "load"): 7.5}, {"alpha": 1}, {"big": 3})
    samples = scrape(stub)
    assert samples["vllmd_model_restarts_total", (("class", "hung"), ("model", "alpha"))] == 2
    assert samples["vllmd_model_start_seconds", (("model", "alpha"), ("phase", "load"))] == 7.5
    assert samples["vllmd_hangs_total", (("model", "alpha"),)] == 1
    assert samples["vllmd_hangs_total", (("model", "big"),)] == 0
    assert samples["vllmd_overruns_total", (("model", "big"),)] == 3


def test_the_daemon_itself_is_shown() -> None:
    """Version, uptime and its process."""
    samples = scrape(Stub())
    assert samples["vllmd_build_info", (("version", "1"),)] == 1
    assert samples["vllmd_uptime_seconds", ()] == 9.5
    assert samples["process_resident_memory_bytes", ()] > 1 << 20


def test_a_scrape_reads_the_status_once() -> None:
    """100 models cost one status."""
    stub = Stub()
    calls = []
    original = stub.status
    stub.status = lambda: (calls.append(1), original())[1]  # type: ignore[method-assign,func-returns-value]
    render(stub)
    assert len(calls) == 1
