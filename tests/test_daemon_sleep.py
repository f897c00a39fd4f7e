"""A daemon, and fake engines whose sleep gives memory back on "cpu" too: tested, used for a swap, given up where it fails."""

import json
import threading

import pytest

from tests.daemon import Vllmd, fake_vllm, vllmd, weights
from tests.test_daemon_gateway import address, ask

__all__ = ["address", "fake_vllm", "vllmd", "weights"]  # fixtures
MIB = 1 << 20
HELD = 600 * MIB


@pytest.fixture
def pair(vllmd: Vllmd) -> Vllmd:
    """Two models of which one fits beside the other asleep."""
    vllmd.http = {"listen": ["127.0.0.1:0"]}
    vllmd.devices = {"limit": "2GiB"}
    vllmd.defaults |= {
        "min_resident": "0s", "swap": "sleep1",
        "env": {"FAKE_START_S": "0.1", "FAKE_MEMORY": str(HELD), "FAKE_TOKENS_PER_S": "200"},
    }  # fmt: skip
    return vllmd.model("a").model("b")


@pytest.mark.parametrize("level", [1, 2])
def test_a_swap_puts_one_to_sleep_and_a_request_wakes_it(pair: Vllmd, level: int) -> None:
    pair.defaults["swap"] = f"sleep{level}"
    pair.start()
    for name in "ab":
        done = pair.ctl("swap-test", name)
        assert done.returncode == 0, done.stdout + done.stderr + pair.story()
        assert done.stdout.count("same") == 5
        assert "its sleep frees 0.6 GiB" in done.stdout
        pair.act("stop", name)
        pair.wait(name, "stopped")
    assert ask(pair, "a")[0] == 200
    pid = pair.look("a")["pid"]
    assert ask(pair, "b")[0] == 200
    asleep = pair.look("a")
    assert (asleep["state"], asleep["pid"]) == ("asleep", pid)
    assert asleep["reserved"] < HELD
    status, _, value = ask(pair, "a")
    assert (status, value["choices"][0]["message"]["content"]) == (200, "the quick brown")
    assert pair.look("a")["pid"] == pid
    assert pair.look("b")["state"] == "asleep"


def test_the_proof_outlives_the_daemon_and_the_sleeper_too(pair: Vllmd) -> None:
    pair.start()
    assert pair.ctl("swap-test", "a").returncode == 0
    assert pair.ctl("sleep", "a").returncode == 0
    pid = pair.look("a")["pid"]
    pair.process.kill()  # type: ignore[union-attr]
    pair.ended()
    pair.start()
    assert (pair.look("a")["state"], pair.look("a")["pid"]) == ("asleep", pid)
    done = pair.ctl("wake", "a", "--json")
    assert json.loads(done.stdout) == {"model": "a", "state": "ready"}
    assert (pair.look("a")["state"], pair.look("a")["pid"]) == ("ready", pid)
    assert ask(pair, "a")[0] == 200


@pytest.mark.parametrize("fault", ["refused", "stuck", "garbled"])
def test_a_sleep_that_fails_is_said_and_the_model_is_up_again(pair: Vllmd, fault: str) -> None:
    pair.model("a", {"sleep": fault}).start()
    waits: list[int] = []
    pair.up("a")
    asker = threading.Thread(target=lambda: waits.append(ask(pair, "a")[0]))
    done = pair.ctl("swap-test", "a", "--json")
    asker.start()
    assert done.returncode == 1
    test = json.loads(done.stdout)
    said = {"refused": "does not fall asleep", "stuck": "does not wake", "garbled": "answers otherwise"}[fault]
    assert said in test["result"]
    assert not test["proved"]
    asker.join(60)
    assert waits == [200]
    refused = pair.ctl("sleep", "a")
    assert (refused.returncode, "vllmctl swap-test a" in refused.stderr) == (1, True)


def test_one_that_keeps_its_memory_makes_room_by_ending(pair: Vllmd) -> None:
    pair.model("a", {"sleep": "leaky"}).start()
    done = pair.ctl("swap-test", "a")
    assert done.returncode == 0
    assert "simulates sleep" in done.stdout
    assert ask(pair, "a")[0] == 200
    assert ask(pair, "b")[0] == 200
    assert pair.look("a")["state"] == "stopped"


def test_a_model_that_sleeps_has_no_port(pair: Vllmd) -> None:
    pair.start()
    pair.model("a", port="auto")
    status, error = pair.reload()
    assert status == 422
    assert "a model that sleeps has no port" in error["data"]["problems"][0]
