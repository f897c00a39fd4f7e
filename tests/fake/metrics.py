"""/metrics: the counters of one engine in vLLM's names, as of its last word: stale when it hangs, as in vLLM."""

from typing import NamedTuple

# Only for the size of the body: the real one has some fifty further histograms' buckets.
FILLER = 'vllm:request_params_n_bucket{%s,le="%d"} 0.0\n'
BUCKETS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


class Counts(NamedTuple):
    """Totals since the start and the scheduler's last report."""

    running: int = 0
    waiting: int = 0
    kv: float = 0.0
    prompt: int = 0
    generated: int = 0
    iterations: int = 0
    done: int = 0
    seconds: float = 0.0
    sleep: int = 0


def render(counts: Counts, model: str, kv_tokens: int, utilization: float, size: int) -> str:
    """The exposition text for `counts`, filled up to `size` bytes."""
    labels = f'engine="0",model_name="{model}"'
    states = ("awake", "weights_offloaded", "discard_all")
    lines = [
        gauge("num_requests_running", labels, counts.running),
        gauge("num_requests_waiting", labels, counts.waiting),
        gauge("num_requests_waiting_by_reason", labels + ',reason="capacity"', counts.waiting),
        gauge("kv_cache_usage_perc", labels, counts.kv),
        "# TYPE vllm:engine_sleep_state gauge\n",
        *(row("engine_sleep_state", f'{labels},sleep_state="{s}"', counts.sleep == n) for n, s in enumerate(states)),
        counter("prompt_tokens", labels, counts.prompt),
        counter("generation_tokens", labels, counts.generated),
        counter("num_preemptions", labels, 0),
        counter("prefix_cache_queries", labels, counts.prompt),
        counter("prefix_cache_hits", labels, 0),
        counter("request_success", labels + ',finished_reason="length"', counts.done),
        counter("admission_rejections", labels + ',reason="max_num_queued_reqs"', 0),
        histogram("iteration_tokens_total", labels, counts.iterations, counts.prompt + counts.generated),
        histogram("e2e_request_latency_seconds", labels, counts.done, counts.seconds),
        histogram("time_to_first_token_seconds", labels, counts.done, counts.seconds / 4),
        gauge(
            "cache_config_info",
            f'block_size="128",engine="0",gpu_memory_utilization="{utilization}",kv_cache_size_tokens="{kv_tokens}",'
            f'num_gpu_blocks="{kv_tokens // 128}"',
            1,
        ),
    ]
    text = "".join(lines)
    filler = [FILLER % (labels, n) for n in range(max(0, size - len(text)) // len(FILLER % (labels, 100)))]
    return text + "".join(filler)


def gauge(name: str, labels: str, value: float) -> str:
    """One gauge with its type line."""
    return f"# TYPE vllm:{name} gauge\n{row(name, labels, value)}"


def row(name: str, labels: str, value: float) -> str:
    """One sample."""
    return f"vllm:{name}{{{labels}}} {float(value)}\n"


def counter(name: str, labels: str, value: float) -> str:
    """One counter; the name gets its _total."""
    return f"# TYPE vllm:{name}_total counter\n{row(name + '_total', labels, value)}"


def histogram(name: str, labels: str, count: int, total: float) -> str:
    """A histogram whose observations all fell into the lowest bucket."""
    rows = [row(name + "_bucket", f'{labels},le="{bound}"', count) for bound in (*BUCKETS, "+Inf")]
    tail = row(name + "_count", labels, count) + row(name + "_sum", labels, total)
    return f"# TYPE vllm:{name} histogram\n{''.join(rows)}{tail}"
