"""Any client, one URL: the official openai and anthropic packages against real vLLM, two models and room for one."""

import http.client
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.conftest import Report
from tests.e2e.daemon import Daemon, Start

MODELS = """
[models.alpha]
model = "{models}/alpha"
aliases = { "claude-small" = {}, terse = { defaults = { max_tokens = 3 }, drop = ["seed"] } }
[models.beta]
model = "{models}/beta"
[models.vectors]
model = "{models}/alpha"
category = ["embed"]
args = { runner = "pooling" }
"""
PATIENT = 300.0  # seconds


@pytest.fixture(scope="module")
def daemon(start: Start) -> Daemon:
    """Nothing is up; alpha and beta do not fit together."""
    return start(MODELS, limit="2.3GiB", defaults='min_resident = "0s"', web=True)


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", timeout=PATIENT, max_retries=0) as made:
        yield made


def states(client: openai.OpenAI) -> dict[str, str]:
    """What GET /v1/models says of each model."""
    rows = [model.model_dump() for model in client.models.list()]
    return {row["id"]: str(row["status"]) for row in rows if "alias_of" not in row}


def test_models_are_listed_before_anything_is_up(client: openai.OpenAI) -> None:
    """All that is configured, with its true state."""
    assert states(client) == dict.fromkeys(("alpha", "beta", "vectors"), "stopped")


def test_a_stream_starts_its_model_and_sees_how_far_it_is(
    daemon: Daemon, client: openai.OpenAI, report: Report
) -> None:
    """200 at once, comments with phase and time, then the tokens; the openai client sees nothing of the comments."""
    began = time.monotonic()
    body = {"model": "alpha", "stream": True, "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
    comments, data, first = [], [], 0.0
    connection = http.client.HTTPConnection(daemon.url.removeprefix("http://"), timeout=PATIENT)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    first = time.monotonic() - began
    for line in answer:
        text = line.decode().rstrip("\n")
        (comments if text.startswith(":") else data).append(text)
    connection.close()
    assert first < 5.0
    assert any("vllmd" in line for line in comments)
    assert data[-2:] == ["data: [DONE]", ""]
    report("gateway: first answer of a cold model, head of the stream", first)
    report("gateway: ... its last token", time.monotonic() - began)
    report("gateway: ... what the client was told meanwhile", " | ".join(line[2:].strip() for line in comments[:4]))
    assert states(client)["alpha"] == "ready"


def test_chat_completions_and_responses_of_a_model_that_is_up(client: openai.OpenAI) -> None:
    """Whole and streamed."""
    chat = client.chat.completions.create(
        model="alpha", messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0
    )
    assert chat.usage is not None and chat.usage.completion_tokens == 5
    pieces = list(
        client.chat.completions.create(
            model="alpha", messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0, stream=True
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == chat.choices[0].message.content
    text = client.completions.create(model="alpha", prompt="one two", max_tokens=4)
    assert text.usage is not None and text.usage.completion_tokens == 4
    answer = client.responses.create(model="alpha", input="hello", max_output_tokens=5)
    assert answer.status in ("completed", "incomplete")


def test_an_alias_fills_in_its_parameters(client: openai.OpenAI) -> None:
    """`terse` is alpha with three tokens, unless the request says otherwise."""
    chat = client.chat.completions.create(model="terse", messages=[{"role": "user", "content": "hello"}], seed=1)
    assert chat.usage is not None and chat.usage.completion_tokens == 3


def test_a_request_for_the_other_model_swaps_it_in(daemon: Daemon, client: openai.OpenAI, report: Report) -> None:
    """beta is asked for: alpha drains and goes, beta starts and answers."""
    began = time.monotonic()
    chat = client.chat.completions.create(model="beta", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    took = time.monotonic() - began
    assert chat.model == "beta"
    assert states(client) == {"alpha": "stopped", "beta": "ready", "vectors": "stopped"}
    assert daemon.said("makes room for beta")
    report("gateway: swap alpha -> beta, whole request", took)
    for name, seconds in timeline(daemon, "alpha", "beta"):
        report(f"gateway: ... {name}", seconds)


def timeline(daemon: Daemon, old: str, new: str) -> Iterator[tuple[str, float]]:
    """The parts of a swap, from vllmd's own log."""
    lines = daemon.said('"VLLMD_') or daemon.said("event")
    at: dict[str, float] = {}
    for line in lines:
        text, model, stamp = str(line["event"]), line.get("model"), line.get("timestamp")
        if not isinstance(stamp, str):
            continue
        seconds = time.mktime(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")) + float("0" + stamp[19:].rstrip("Z")[:7])
        for who, mark in ((old, "ready → draining"), (old, "draining → stopping"), (old, "stopping → stopped"),
                          (new, "waiting → starting"), (new, "starting → ready")):  # fmt: skip
            if model == who and mark in text:
                at[mark] = seconds
    marks = list(at)
    for before, after in itertools.pairwise(marks):
        yield f"{before.split(' → ')[1]}", at[after] - at[before]


def test_the_anthropic_client_swaps_back(daemon: Daemon, client: openai.OpenAI, report: Report) -> None:
    """/v1/messages under an alias, streamed through the swap: pings while it waits, then text."""
    with anthropic.Anthropic(base_url=daemon.url, api_key="none", timeout=PATIENT, max_retries=0) as claude:
        began = time.monotonic()
        with claude.messages.stream(
            model="claude-small", max_tokens=5, messages=[{"role": "user", "content": "hello"}]
        ) as stream:
            kinds = [event.type for event in stream]
        report("gateway: swap beta -> alpha under an Anthropic stream", time.monotonic() - began)
        assert kinds[-1] == "message_stop"
        message = claude.messages.create(model="alpha", max_tokens=4, messages=[{"role": "user", "content": "hello"}])
        assert message.usage.output_tokens == 4
        count = claude.messages.count_tokens(model="alpha", messages=[{"role": "user", "content": "hello"}])
        assert count.input_tokens > 0
        with pytest.raises(anthropic.NotFoundError) as caught:
            claude.messages.create(model="alfa", max_tokens=4, messages=[{"role": "user", "content": "hello"}])
        assert "alpha" in str(caught.value)
    assert states(client)["alpha"] == "ready"


def test_embeddings_of_a_pooling_model(client: openai.OpenAI, report: Report) -> None:
    """A third model, a third swap."""
    began = time.monotonic()
    found = client.embeddings.create(model="vectors", input=["one", "two"])
    assert len(found.data) == 2
    assert len(found.data[0].embedding) > 8
    report("gateway: swap alpha -> vectors, embeddings", time.monotonic() - began)


def test_errors_have_the_clients_shape(client: openai.OpenAI) -> None:
    """Unknown models are 404 with the nearest name; what the engine refuses comes through as it is."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="vektors", messages=[{"role": "user", "content": "x"}])
    assert "vectors" in str(caught.value)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="vectors", input="x " * 4000)


def test_two_clients_of_two_models_are_both_answered(daemon: Daemon, client: openai.OpenAI, report: Report) -> None:
    """Asked at the same time: one is served, then the other."""
    done: dict[str, Any] = {}

    def ask(model: str) -> None:
        chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], max_tokens=3)
        done[model] = (chat.model, time.monotonic() - began)

    began = time.monotonic()
    threads = [threading.Thread(target=ask, args=(name,)) for name in ("alpha", "beta")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT)
    assert {name: value[0] for name, value in done.items()} == {"alpha": "alpha", "beta": "beta"}
    report("gateway: two models asked for at once, room for one", json.dumps({n: round(v[1]) for n, v in done.items()}))
