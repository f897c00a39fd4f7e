"""Two real models in one budget: what is planned and used, who is refused, and that one does not disturb the other."""

import time

import pytest

from tests.e2e.chat import Talk, answers
from tests.e2e.conftest import Report
from tests.e2e.daemon import Daemon, Start
from vllmd.units import gib

PAIR = """
[models.alpha]
model = "{models}/alpha"
port = "auto"
ALPHA
[models.beta]
model = "{models}/beta"
[models.gamma]
model = "{models}/alpha"
category = ["ocr"]
"""
# By itself vLLM binds every worker to the same core of two, where the spinning of a busy one starves all others.
UNBOUND = 'env = { VLLM_CPU_OMP_THREADS_BIND = "nobind" }'
REFUSED_WITHIN = 1.0  # seconds
PAUSE = 2.0  # seconds between two pieces of a stream, when the neighbour's end takes its share of two cores


def pair(alpha: str = "") -> str:
    return PAIR.replace("ALPHA", alpha)


@pytest.fixture(scope="module")
def daemon(start: Start, report: Report) -> Daemon:
    running = start(pair(), defaults=UNBOUND)
    done = running.ctl("start", "alpha", "beta")
    assert done.code == 0, done.err
    report("two models at once, from nothing", done.seconds)
    return running


def test_both_serve_within_one_budget(daemon: Daemon, report: Report) -> None:
    """Both answer, each on its own endpoint; what is reserved fits the budget and covers what is used."""
    status = daemon.client.get("/api/v1/status")
    (device,) = status["devices"]
    alpha, beta = daemon.status("alpha"), daemon.status("beta")
    assert alpha["endpoint"].startswith("http://127.0.0.1:")
    assert beta["endpoint"].startswith("unix:/")
    assert answers(alpha)
    assert answers(beta)
    assert device["reserved"] == alpha["reserved"] + beta["reserved"] <= device["budget"]
    assert 0 < alpha["used"] <= alpha["reserved"]
    assert 0 < beta["used"] <= beta["reserved"]
    report("first start: planned (estimated), used", f"{gib(alpha['reserved'])}, {gib(alpha['used'])}")


def test_third_is_refused_at_once_with_the_sum(daemon: Daemon, report: Report) -> None:
    """Exit code 5 and HTTP 409: what it needs, what is left, who has the rest, and what would make room."""
    done = daemon.ctl("start", "gamma")
    assert done.code == 5
    assert done.seconds < REFUSED_WITHIN
    assert "cannot start gamma: needs " in done.err
    assert "alpha " in done.err and "beta " in done.err and "of 3.5 GiB left" in done.err
    assert "vllmctl stop alpha" in done.err
    raw, body = daemon.client.fetch("POST", "/api/v1/models/gamma/start", {})
    assert raw.status == 409, body
    assert daemon.status("gamma")["state"] == "stopped"
    report("third model refused", done.seconds)
    report("third model: why", done.err.splitlines()[0])


def test_stop_of_one_does_not_disturb_the_other(daemon: Daemon, report: Report) -> None:
    """While beta streams, alpha is stopped: beta's stream goes on, its processes are the same, alpha's memory is free."""
    before = daemon.status("beta")
    tree = daemon.tree("beta")
    with Talk(before, tokens=400) as talk:
        done = daemon.ctl("stop", "alpha")
        assert done.code == 0, done.err
    assert talk.error is None
    assert max(talk.pauses) < PAUSE
    assert set(talk.reasons) == {"length"}
    assert daemon.tree("alpha") == []
    assert daemon.tree("beta") == tree
    after = daemon.status("beta")
    assert (after["pid"], after["attempt"]) == (before["pid"], before["attempt"])
    assert daemon.status("alpha")["reserved"] == 0
    report("stop of an idle model, its neighbour streaming", done.seconds)
    report("neighbour's longest pause between two tokens", max(talk.pauses))


def test_second_start_is_planned_from_the_first(daemon: Daemon, report: Report) -> None:
    """Memory learned: planned >= used at all times, and used >= 0.9 planned."""
    done = daemon.ctl("start", "alpha")
    assert done.code == 0, done.err
    assert answers(daemon.status("alpha"))
    alpha = daemon.wait("alpha", lambda m: m["used"])
    assert alpha["need_measured"]
    assert 0.9 * alpha["reserved"] <= alpha["used"] <= alpha["reserved"]
    report("second start, warm", done.seconds)
    report(
        "second start: planned (measured), used",
        f"{gib(alpha['reserved'])}, {gib(alpha['used'])}: {alpha['used'] / alpha['reserved']:.3f}",
    )


def test_reload_restarts_only_what_changed(daemon: Daemon, report: Report) -> None:
    """alpha's kv_cache changes: alpha restarts with it, beta keeps its pid and answers throughout."""
    alpha, beta = daemon.status("alpha"), daemon.status("beta")
    tree = daemon.tree("beta")
    daemon.configure(pair('kv_cache = "96MiB"'))
    dry = daemon.ctl("reload", "--dry-run")
    assert dry.code == 0, dry.err
    assert daemon.status("alpha")["state"] == "ready"
    with Talk(beta, tokens=20, rest=4.0) as talk:
        began = time.monotonic()
        done = daemon.ctl("reload")
        assert done.code == 0, done.err
        again = daemon.wait("alpha", lambda m: m["state"] == "ready" and m["attempt"] > alpha["attempt"])
        took = time.monotonic() - began
    assert talk.error is None
    assert set(talk.reasons) == {"length"}
    assert daemon.tree("beta") == tree
    assert daemon.status("beta")["pid"] == beta["pid"]
    assert again["pid"] != alpha["pid"]
    assert again["restarts"] == 0
    # 32 MiB more, and what was measured of the rest once more.
    assert again["reserved"] - alpha["reserved"] >= 24 << 20
    assert "100663296" in daemon.client.get("/api/v1/models/alpha")["argv"]
    report("reload until the changed model is ready, its neighbour streaming", took)
