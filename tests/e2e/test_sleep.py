"""vLLM's sleep mode against real vLLM. Its CPU build only simulates sleep, so this shows the protocol and not the memory: every
call of both levels, the same answers after it, and that such a sleep is never taken for room."""

import json

import pytest

from tests.e2e.chat import answers
from tests.e2e.conftest import Report
from tests.e2e.daemon import Daemon, Start

MODELS = """
[models.alpha]
model = "{models}/alpha"
swap = "sleep1"
[models.beta]
model = "{models}/beta"
swap = "sleep2"
[models.vectors]
model = "{models}/alpha"
category = ["embed"]
swap = "sleep2"
args = { runner = "pooling" }
"""


@pytest.fixture(scope="module")
def daemon(start: Start) -> Daemon:
    return start(MODELS, limit="2.3GiB")


@pytest.mark.parametrize("name", ["alpha", "beta", "vectors"])
def test_swap_test_of_each_level(daemon: Daemon, report: Report, name: str) -> None:
    """Five times asleep and awake, each with the same answer; the model was down, and is up after it."""
    done = daemon.ctl("swap-test", name, "--json")
    assert done.code == 0, done.out + done.err
    test = json.loads(done.out)
    assert [cycle["same"] for cycle in test["cycles"]] == [True] * 5
    assert (test["proved"], test["frees"]) == (True, 0)
    assert "vLLM's CPU build only simulates sleep" in test["result"]
    what = f"swap-test of {name}, level {test['level']}"
    report(f"{what}: slowest sleep", max(cycle["sleep_s"] for cycle in test["cycles"]))
    report(f"{what}: slowest waking", max(cycle["wake_s"] for cycle in test["cycles"]))
    if name != "vectors":
        assert answers(daemon.wait(name, lambda model: model["state"] == "ready"))
    daemon.ctl("stop", name)


def test_asleep_its_endpoint_is_left_alone_and_it_wakes_as_it_was(daemon: Daemon) -> None:
    """The same processes before and after; the socket is all there is, nobody listens on a port."""
    daemon.ctl("start", "alpha")
    pid = daemon.status("alpha")["pid"]
    assert daemon.ctl("sleep", "alpha").code == 0
    assert (daemon.status("alpha")["state"], daemon.status("alpha")["endpoint"]) == ("asleep", None)
    assert daemon.ctl("wake", "alpha").code == 0
    awake = daemon.status("alpha")
    assert (awake["state"], awake["pid"]) == ("ready", pid)
    assert awake["endpoint"].startswith("unix:")
    assert answers(awake)


def test_a_sleep_that_frees_nothing_is_no_way_to_make_room(daemon: Daemon) -> None:
    """alpha is up and proved: for beta, which needs its place, it would have to end."""
    assert daemon.ctl("start", "beta", "--no-wait").code == 5
    assert "stop alpha" in daemon.why("beta")["why"]["text"]
