"""A daemon, its gateway and fake engines that do not fit together: swaps, deaths, hangs and doors, as clients meet them."""

import hashlib
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import LIMIT, Vllmd, fake_vllm, vllmd, weights

__all__ = ["fake_vllm", "vllmd", "weights"]  # fixtures
Answer = tuple[int, dict[str, str], Any]


@pytest.fixture
def pair(vllmd: Vllmd) -> Vllmd:
    """Two models of which one fits. Nobody stays longer than it is asked for."""
    vllmd.http = {"listen": ["127.0.0.1:0"]}
    vllmd.devices = {"limit": "2GiB"}
    vllmd.defaults |= {"min_resident": "0s", "env": {"FAKE_START_S": "0.1", "FAKE_TOKENS_PER_S": "200"}}
    return vllmd.model("a").model("b")


def address(vllmd: Vllmd) -> tuple[str, int]:
    """Where it listens now."""
    urls = [line["web"][0] for line in vllmd.lines if line["event"] == "vllmd is ready"]
    host, _, port = urls[-1].partition("://")[2].partition(":")
    return host, int(port)


def ask(vllmd: Vllmd, model: str, path: str = "/v1/chat/completions", **more: Any) -> Answer:
    """One request to its end: status, headers, JSON or text."""
    headers = {"Content-Type": "application/json"} | more.pop("headers", {})
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3} | more
    connection = http.client.HTTPConnection(*address(vllmd), timeout=LIMIT)
    connection.request("POST", path, json.dumps(body), headers)
    return read(connection)


def read(connection: http.client.HTTPConnection) -> Answer:
    answer = connection.getresponse()
    raw = answer.read()
    connection.close()
    kind = answer.headers.get_content_type()
    return answer.status, dict(answer.headers), json.loads(raw) if kind == "application/json" else raw.decode()


def models(vllmd: Vllmd) -> dict[str, str]:
    connection = http.client.HTTPConnection(*address(vllmd), timeout=LIMIT)
    connection.request("GET", "/v1/models")
    return {card["id"]: card["status"] for card in read(connection)[2]["data"]}


def together(*works: Callable[[], Any]) -> list[Any]:
    """All at once, their results in order."""
    results: list[Any] = [None] * len(works)

    def run(at: int) -> None:
        results[at] = works[at]()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    return results


def engine_of(vllmd: Vllmd, model: str) -> int:
    """Its engine core."""
    return next(process.pid for process in vllmd.tree(model) if "EngineCor" in process.name)


def test_a_request_starts_its_model_and_the_next_one_swaps_it(pair: Vllmd) -> None:
    """Nothing is told to start; /v1/models is true at each step; the log says who made room and how long it took."""
    pair.start()
    assert models(pair) == {"a": "stopped", "b": "stopped"}
    status, headers, value = ask(pair, "a")
    assert (status, value["model"]) == (200, "a")
    assert headers["X-Request-Id"]
    assert models(pair) == {"a": "ready", "b": "stopped"}
    assert ask(pair, "b")[0] == 200
    assert models(pair) == {"a": "stopped", "b": "ready"}
    pair.hear(lambda line: line.get("kind") == "evict" and "makes room for b" in line["event"])
    told = pair.hear(lambda line: line.get("kind") == "swap")
    assert "a emptied in " in told["event"] and "drained in " in told["event"]


def test_a_b_a_b_is_few_swaps(pair: Vllmd) -> None:
    """Forty requests, A B A B, at once: all answered, far fewer swaps than requests."""
    pair.defaults["min_resident"] = "2s"
    pair.start()
    answers = together(*(lambda n=n: ask(pair, "ab"[n % 2]) for n in range(40)))
    assert {status for status, _, _ in answers} == {200}
    swaps = [line for line in pair.lines if line.get("kind") == "evict" and "makes room" in line["event"]]
    assert 1 <= len(swaps) <= 4


def test_a_stream_is_finished_before_its_model_makes_room(pair: Vllmd) -> None:
    pair.defaults["max_wait"] = "500ms"
    pair.start()
    ask(pair, "a")
    stream, other = together(lambda: ask(pair, "a", stream=True, max_tokens=300), lambda: waits(pair, "b"))
    assert stream[2].count('"content"') >= 300 and stream[2].rstrip().endswith("data: [DONE]")
    assert other[0] == 200


def waits(vllmd: Vllmd, model: str) -> Answer:
    """A request while the other model is busy."""
    vllmd.wait("a", lambda m: m["requests_running"] > 0 or m["idle_s"] is None)
    return ask(vllmd, model)


def test_an_engine_that_is_killed_before_its_answer_loses_nothing(pair: Vllmd) -> None:
    pair.model("a", {"prefill_s": 1.0, "start_s": 0.1}).start()
    ask(pair, "a")

    def kill() -> None:
        pair.wait("a", lambda m: m["idle_s"] is None and m["state"] == "ready")
        for process in pair.tree("a"):
            os.kill(process.pid, signal.SIGKILL)

    answer, _ = together(lambda: ask(pair, "a"), kill)
    assert answer[0] == 200
    assert pair.look("a")["restarts"] == 1


def test_an_engine_that_is_killed_in_a_stream_ends_it_with_an_error(pair: Vllmd) -> None:
    pair.model("a", {"tokens_per_s": 20, "start_s": 0.1}).start()
    ask(pair, "a")
    connection = http.client.HTTPConnection(*address(pair), timeout=LIMIT)
    body = {"model": "a", "prompt": "x", "max_tokens": 400, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    os.kill(engine_of(pair, "a"), signal.SIGKILL)
    rest = answer.read().decode()
    connection.close()
    error = json.loads(rest.strip().splitlines()[-3 if rest.rstrip().endswith("[DONE]") else -1].removeprefix("data: "))
    assert "error" in error
    pair.wait("a", lambda m: m["state"] == "ready" and m["attempt"] == 2)


def test_a_hung_engine_does_not_keep_the_other_model_from_its_requests(pair: Vllmd) -> None:
    """a has a request and is frozen; b is asked for, and answered within its patience and a load."""
    pair.defaults |= {"hang_after": "5s", "max_wait": "20s"}
    pair.start()
    ask(pair, "a")
    frozen = engine_of(pair, "a")
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    stuck, answer = together(lambda: ask(pair, "a"), lambda: ask(pair, "b"))
    assert answer[0] == 200
    assert time.monotonic() - began < 60
    assert stuck[0] in (200, 502, 503)
    assert pair.happened("note") and any(n["kind"] == "hung" for n in pair.happened("note"))


def test_a_client_that_leaves_while_it_loads_does_not_stop_the_load(pair: Vllmd) -> None:
    pair.model("a", {"start_s": 2.0}).start()
    connection = http.client.HTTPConnection(*address(pair), timeout=LIMIT)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": "a", "messages": []}))
    pair.wait("a", "starting")
    connection.close()
    pair.wait("a", "ready")
    assert pair.look("a")["requests_in_line"] == 0


def test_a_model_that_cannot_start_refuses_with_its_cause(pair: Vllmd) -> None:
    pair.model("a", {"fail": "arch"}).start()
    status, _, value = ask(pair, "a")
    assert status == 503
    assert "NoSuchForCausalLM" in value["error"]["message"]
    again = ask(pair, "a")
    assert again[0] == 503
    assert pair.look("a")["attempt"] == 1


def test_ttl_and_on_demand(pair: Vllmd) -> None:
    """Idle for its ttl it stops, and comes back with the next request; what is not on demand does not come."""
    pair.model("a", ttl="2s").model("b", on_demand=False).start()
    ask(pair, "a")
    pair.wait("a", lambda m: m["unloads_in_s"] is not None)
    pair.wait("a", "stopped")
    assert ask(pair, "a")[0] == 200
    status, _, value = ask(pair, "b")
    assert status == 503
    assert "vllmctl start b" in value["error"]["hint"]


def test_an_adopted_model_serves_through_the_next_daemon(pair: Vllmd) -> None:
    pair.start()
    ask(pair, "a")
    before = pair.look("a")
    assert pair.stop(signal.SIGKILL) == -signal.SIGKILL
    pair.start()
    assert ask(pair, "a")[0] == 200
    assert pair.look("a")["pid"] == before["pid"]


def test_a_stop_lets_requests_finish(pair: Vllmd) -> None:
    pair.model("a", {"tokens_per_s": 50, "start_s": 0.1}).start()
    ask(pair, "a")

    def stop() -> int:
        pair.wait("a", lambda m: m["idle_s"] is None)
        return pair.stop()

    stream, code = together(lambda: ask(pair, "a", stream=True, max_tokens=60), stop)
    assert stream[2].rstrip().endswith("data: [DONE]")
    assert stream[2].count('"content"') >= 60
    assert code == 0


def test_lent_memory_is_free_and_comes_back(pair: Vllmd) -> None:
    pair.devices = {}
    pair.start()
    size = pair.device()["free"] - (1 << 30)
    ask(pair, "a")
    done = pair.ctl("lend", str(size), "--for", "1h", "--json")
    assert done.returncode == 0, done.stderr
    assert pair.look("a")["state"] == "waiting"
    assert pair.device()["lent_missing"] == 0 and pair.device()["lent"] == size
    status, _, value = ask(pair, "a")
    assert status == 503 and "lent" in value["error"]["message"]
    assert pair.ctl("lend", "--end").returncode == 0
    pair.wait("a", "ready")


# -- doors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8400", "localhost.evil.example"])
def test_a_name_that_was_bound_anew_is_not_ours(pair: Vllmd, host: str) -> None:
    """DNS rebinding: the browser asks us under the attacker's name."""
    pair.start()
    status, _, value = ask(pair, "a", headers={"Host": host})
    assert status == 421
    assert value["error"]["code"] == "bad_host"
    assert ask(pair, "a", headers={"Origin": "https://evil.example"})[0] == 403
    assert pair.look("a")["state"] == "stopped"


def test_keys_are_asked_for_where_they_are_needed_and_follow_a_reload(pair: Vllmd) -> None:
    keys = {name: f"vllmd-{name}" for name in ("all", "only-a", "reader")}
    hashes = {name: "sha256:" + hashlib.sha256(key.encode()).hexdigest() for name, key in keys.items()}
    pair.http["open_loopback"] = False
    pair.keys = {
        "all": {"hash": hashes["all"], "scopes": ["infer", "admin"]},
        "only-a": {"hash": hashes["only-a"], "models": ["a"]},
        "reader": {"hash": hashes["reader"], "scopes": ["read"]},
    }
    pair.start()

    def bearer(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {keys[name]}"}

    status, headers, value = ask(pair, "a")
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert value["error"]["type"] == "authentication_error"
    assert ask(pair, "a", "/v1/messages", headers={"x-api-key": "nonsense"})[2]["type"] == "error"
    assert ask(pair, "a", headers=bearer("only-a"))[0] == 200
    assert ask(pair, "b", headers=bearer("only-a"))[0] == 403
    assert ask(pair, "a", headers=bearer("reader"))[0] == 403
    for name, code in (("reader", 200), ("only-a", 403), ("all", 200)):
        assert get(pair, "/api/v1/status", bearer(name)) == code, name
    assert post(pair, "/api/v1/models/a/stop", bearer("reader")) == 403
    assert post(pair, "/api/v1/models/a/stop", bearer("all")) == 202
    pair.hear(lambda line: line["event"] == "stop asked for" and line.get("key") == "all")
    del pair.keys["only-a"]
    assert pair.reload()[0] == 200
    assert ask(pair, "a", headers=bearer("only-a"))[0] == 401
    assert keys["all"] not in pair.said


def get(vllmd: Vllmd, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(*address(vllmd), timeout=LIMIT)
    connection.request("GET", path, headers=headers)
    return read(connection)[0]


def post(vllmd: Vllmd, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(*address(vllmd), timeout=LIMIT)
    connection.request("POST", path, "{}", headers)
    return read(connection)[0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command to make certificates")
def test_tls_with_a_certificate_that_changes(pair: Vllmd, tmp_path: Path) -> None:
    """Served from files, read again at a reload; one that is broken leaves the old one."""
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    make_certificate(certificate, key)
    pair.http |= {"tls_cert": str(certificate), "tls_key": str(key)}
    pair.start()
    host, port = address(pair)

    def serial() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, context=context, timeout=LIMIT)
        connection.request("GET", "/v1/models", headers={"Host": f"127.0.0.1:{port}"})
        seen = connection.sock.getpeercert(binary_form=True)
        assert read(connection)[0] == 200
        return seen

    first = serial()
    make_certificate(certificate, key)
    assert pair.reload()[0] == 200
    second = serial()
    assert second != first
    certificate.write_text("nonsense")
    pair.reload()
    pair.hear(lambda line: "the old certificate stays" in line["event"])
    assert serial() == second


def make_certificate(certificate: Path, key: Path) -> None:
    """One that signs itself."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost"], check=True, capture_output=True, timeout=LIMIT,
    )  # fmt: skip


def test_a_listener_for_others_needs_a_key(pair: Vllmd) -> None:
    """Refused before anything is started, with what to do."""
    pair.http = {"listen": ["0.0.0.0:0"]}
    pair.write()
    pair.spawn()
    assert pair.ended() == 78
    assert "needs an API key (`vllmctl key NAME` makes one" in pair.said
