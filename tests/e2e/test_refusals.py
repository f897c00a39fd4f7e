"""What cannot start: refused before vLLM is paid for where it can be, one line with a remedy always, never retried."""

import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import Report
from tests.e2e.daemon import Daemon, Start

PREFLIGHT = 1.0  # seconds

CODE = '''"""The shape of GOT-OCR: a model with code of its own, which imports a package that nobody has installed."""

from transformers import LlamaConfig, LlamaForCausalLM

import verovio


class GOTConfig(LlamaConfig):
    model_type = "GOT"


class GOTForCausalLM(LlamaForCausalLM):
    config_class = GOTConfig
'''
MODELS = """
[models.no-path]
model = "/nonexistent/model"
[models.no-flag]
model = "{models}/alpha"
args = { no-such-flag = 3 }
[models.small-kv]
model = "{models}/alpha"
kv_cache = "256KiB"
[models.no-port]
model = "{models}/alpha"
port = PORT
[models.long]
model = "{models}/alpha"
max_model_len = 4096
[models.no-trust]
model = "GOT"
[models.no-package]
model = "GOT"
args = { trust-remote-code = true }
[models.hidden-kv]
model = "{models}/alpha"
kv_cache = "256KiB"
args = { hf-overrides = { num_hidden_layers = 2 } }
"""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What must be said of a model: its class, words of the sentence, words of the remedies."""

    kind: str
    says: tuple[str, ...]
    remedy: str


AT_ONCE = {
    "no-path": Refusal("no-model", ("/nonexistent/model",), "model"),
    "no-flag": Refusal("unknown-flag", ("no-such-flag",), "no-such-flag"),
    "small-kv": Refusal("kv-too-small", ("512 tokens needs 320 KiB", "kv_cache is 256 KiB"), "max_model_len = 384"),
    "no-port": Refusal("port-taken", ("is taken by", "pytest"), 'port = "auto"'),
    "long": Refusal("context-too-long", ("4096", "2048"), "max_model_len = 2048"),
    "no-trust": Refusal("needs-remote-code", ("trust-remote-code",), "trust-remote-code = true"),
}
BY_VLLM = {
    "no-package": Refusal("package-missing", ("verovio",), "verovio"),
    "hidden-kv": Refusal("kv-too-small", ("max_model_len 512",), "max_model_len = 384"),
}


@pytest.fixture(scope="module")
def daemon(engine: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    got = tmp_path_factory.mktemp("got") / "GOT-OCR"
    shutil.copytree(engine / "models/alpha", got)
    config = json.loads((got / "config.json").read_text())
    auto = {"AutoConfig": "modeling_GOT.GOTConfig", "AutoModelForCausalLM": "modeling_GOT.GOTForCausalLM"}
    config |= {"model_type": "GOT", "architectures": ["GOTForCausalLM"], "auto_map": auto}
    (got / "config.json").write_text(json.dumps(config))
    (got / "modeling_GOT.py").write_text(CODE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        yield start(MODELS.replace("GOT", str(got)).replace("PORT", port))


def check(daemon: Daemon, name: str, want: Refusal) -> str:
    """The same sentence and a remedy in status, `why` and log; one start at most, none to come. Returns the sentence."""
    model = daemon.status(name)
    text, remedies = model["why"]["text"], [each["text"] for each in model["why"]["remedies"]]
    assert model["why"]["class"] == want.kind
    assert all(words in text for words in want.says)
    assert "\n" not in text
    assert any(want.remedy in each for each in remedies)
    table, why = daemon.ctl("status").out, daemon.ctl("why", name).out
    assert text in why
    assert all(each in why for each in remedies)
    assert model["why"]["short"] in table
    assert daemon.said(text)
    assert model["restarts"] == 0
    assert model["pid"] is None
    assert model["deadline_s"] is None
    assert model["reserved"] == 0
    return str(text)


@pytest.mark.parametrize("name", AT_ONCE)
def test_preventable_failure_is_refused_at_once(daemon: Daemon, name: str, report: Report) -> None:
    """In under a second, by `vllmctl start`, with the cause and the remedy; no process is started for it."""
    done = daemon.ctl("start", name)
    assert done.code == 1
    assert done.seconds < PREFLIGHT
    assert done.out == ""
    text = check(daemon, name, AT_ONCE[name])
    assert text in done.err
    assert AT_ONCE[name].remedy in done.err
    assert not (daemon.log_dir / f"{name}.log").exists()
    report(f"refused {name}", done.seconds)
    report(f"refused {name}: why", text)


@pytest.mark.parametrize("name", BY_VLLM)
def test_failure_that_only_vllm_can_find_is_not_retried(daemon: Daemon, name: str, report: Report) -> None:
    """vLLM itself says it, sixty lines above its end: one line with the remedy, `failed`, and no second try."""
    events = daemon.last_event()
    done = daemon.ctl("start", name)
    assert done.code == 1
    text = check(daemon, name, BY_VLLM[name])
    assert text in done.err
    assert BY_VLLM[name].remedy in done.err
    assert daemon.states(name, events, "stopped") == ["waiting", "starting", "stopping", "failed"]
    assert daemon.tree(name) == []
    assert daemon.ctl("logs", "--failed", name).out.strip()
    report(f"failed {name}", done.seconds)
    report(f"failed {name}: why", text)
