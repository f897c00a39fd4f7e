"""/metrics: the status and the tallies in Prometheus' words, read once per scrape.

Every series of a configured model is there in every state, with 0 where there is nothing, so that graphs and alerts do
not lose it when the model stops.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllmd.edge.backend import Backend, Tallies

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
STATES: Final = (
    "stopped", "waiting", "starting", "ready", "dozing", "asleep", "waking", "draining", "stopping", "backoff", "failed",
)  # fmt: skip
DEVICE_BYTES: Final = {
    "total": "Physical memory.",
    "budget": "What may be reserved in all.",
    "reserved": "Sum of all reservations.",
    "used": "In use by everybody.",
    "external": "In use by other programs.",
    "free": "What a model could still reserve.",
}
MODEL_BYTES: Final = {
    "reserved": "Reserved for the model.",
    "used": "Measured use of the model.",
    "need": "What the model needs on each device; 0 = not known.",
}
MODEL_GAUGES: Final = {
    "vllmd_model_requests_in_line": ("requests_in_line", "Requests that wait for it in the gateway."),
    "vllmd_model_requests_running": ("requests_running", "Requests in the engine."),
    "vllmd_model_requests_waiting": ("requests_waiting", "Requests in the engine's queue."),
    "vllmd_model_tokens_per_second": ("tokens_per_s", "Tokens generated per second."),
}


def render(backend: Backend) -> bytes:
    """The exposition text of this moment."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Scrape(backend.status(), backend.tallies()))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class _Scrape(Collector):
    """One reading of the daemon as metric families."""

    def __init__(self, status: Mapping[str, Any], tallies: Tallies) -> None:
        self._daemon = status["daemon"]
        self._devices = status["devices"]
        self._models = status["models"]
        self._tallies = tallies

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are checked by our tests, not on every scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All families."""
        info = GaugeMetricFamily("vllmd_build_info", "The running version.", labels=("version",))
        info.add_metric((self._daemon["version"],), 1)
        yield info
        yield GaugeMetricFamily("vllmd_uptime_seconds", "Since the daemon started.", value=self._daemon["uptime_s"])
        yield from self._of_devices()
        yield from self._of_models()
        yield from self._counted()

    def _of_devices(self) -> Iterable[Metric]:
        for key, meaning in DEVICE_BYTES.items():
            family = GaugeMetricFamily(f"vllmd_device_{key}_bytes", meaning, labels=("device", "index"))
            for device in self._devices:
                index = "" if device["index"] is None else str(device["index"])
                family.add_metric((device["id"], index), device[key])
            yield family

    def _of_models(self) -> Iterable[Metric]:
        states = GaugeMetricFamily("vllmd_model_state", "1 for the state it is in.", labels=("model", "state"))
        for model in self._models:
            for state in STATES:
                states.add_metric((model["name"], state), model["state"] == state)
        yield states
        for key, meaning in MODEL_BYTES.items():
            yield self._by_model(f"vllmd_model_{key}_bytes", key, meaning)
        for name, (key, meaning) in MODEL_GAUGES.items():
            yield self._by_model(name, key, meaning)

    def _by_model(self, name: str, key: str, meaning: str) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=("model",))
        for model in self._models:
            family.add_metric((model["name"],), model[key] or 0)
        return family

    def _counted(self) -> Iterable[Metric]:
        tallies = self._tallies
        restarts = CounterMetricFamily(
            "vllmd_model_restarts", "Restarts by vllmd, by class of the cause.", labels=("model", "class")
        )
        for (model, kind), times in sorted(tallies.restarts.items()):
            restarts.add_metric((model, kind), times)
        yield restarts
        seconds = GaugeMetricFamily(
            "vllmd_model_start_seconds", "What a start usually takes, by phase.", labels=("model", "phase")
        )
        for (model, phase), value in sorted(tallies.start_seconds.items()):
            seconds.add_metric((model, phase), value)
        yield seconds
        yield GaugeMetricFamily(
            "vllmd_gateway_held_bytes", "Bodies of requests that are held.", value=tallies.held_bytes
        )
        for name, meaning, labels, pairs in (
            ("vllmd_swaps", "Models that made room for another.", ("model", "for"), tallies.swaps),
            ("vllmd_gateway_answers", "Requests answered by engines.", ("model", "status"), tallies.answers),
            ("vllmd_gateway_refusals", "Requests refused by vllmd.", ("status", "code"), tallies.refusals),
        ):
            family = CounterMetricFamily(name, meaning, labels=labels)
            for key, times in sorted(pairs.items()):
                family.add_metric(key, times)
            yield family
        for name, meaning, counts in (
            ("vllmd_hangs", "Engines that hung.", tallies.hangs),
            ("vllmd_overruns", "Uses beyond the reservation.", tallies.overruns),
            ("vllmd_idle_stops", "Stops because of its ttl.", tallies.idle_stops),
            ("vllmd_gateway_retries", "Requests asked anew because the engine died.", tallies.retries),
            ("vllmd_gateway_waits", "Requests that stood in line.", tallies.waits),
            ("vllmd_gateway_wait_seconds", "What they waited in all.", tallies.wait_seconds),
        ):
            family = CounterMetricFamily(name, meaning, labels=("model",))
            for model in self._models:
                family.add_metric((model["name"],), counts.get(model["name"], 0))
            yield family
