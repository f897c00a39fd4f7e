"""vllmd/edge/inspect, engine, hub, weights, port: what is found before a start, and each refusal with its reason."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fake.environment import install
from tests.fake.make_model import make_model
from vllmd.edge import port as ports
from vllmd.edge.engine import check_flags, read_installation
from vllmd.edge.inspect import inspect
from vllmd.edge.weights import read_model
from vllmd.facts import Inspection, ModelFacts
from vllmd.spec import Cause, ModelSpec

REAL = Path(__file__).parents[1] / ".engine"


@dataclass
class Place:
    """A machine with one vLLM and one model on it."""

    root: Path
    command: Path
    model: Path

    def look(
        self, taken: dict[int, str] | None = None, env: dict[str, str] | None = None, **spec: Any
    ) -> Inspection | Cause:
        """Inspect the model "m" with these changes."""
        keys = {"model": str(self.model), "executable": str(self.command)} | spec
        return inspect(
            ModelSpec("m", **keys),
            cache_dir=self.root / "cache",
            log_dir=self.root / "log",
            state_dir=self.root / "state",
            taken_ports=taken or {},
            env={"PATH": os.environ["PATH"], "HOME": str(self.root)} | (env or {}),
        )

    def refused(self, kind: str, **more: Any) -> Cause:
        """The cause of a refusal, which must be well formed and of this kind."""
        outcome = self.look(**more)
        assert isinstance(outcome, Cause), outcome
        assert outcome.kind == kind, outcome
        assert outcome.text.startswith("cannot start m: ") and len(outcome.short) <= 24
        assert 1 <= len(outcome.remedies) <= 2
        return outcome

    def found(self, **more: Any) -> Inspection:
        outcome = self.look(**more)
        assert isinstance(outcome, Inspection), outcome
        return outcome


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, install(tmp_path / "venv"), make_model(tmp_path / "models/tiny"))


def test_all_is_well(place: Place) -> None:
    """A good model on a good installation: what is on disk is told."""
    began = time.monotonic()
    found = place.found()
    assert time.monotonic() - began < 1
    assert found.engine.executable == str(place.command) and found.engine.version == "0.32.0+cpu"
    assert found.engine.flags and "max-model-len" in found.engine.flags
    assert found.model.path == str(place.model) and found.model.config["model_type"] == "llama"
    assert found.model.weights == (place.model / "model.safetensors").stat().st_size - header_end(place.model)
    assert found.port is None


def header_end(model: Path) -> int:
    return 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")


# -- the engine -------------------------------------------------------------------------------------------------------


def test_executable_is_found_in_path(place: Place) -> None:
    """A bare name is looked for in the PATH that the engine will have."""
    path = f"{place.command.parent}:{os.environ['PATH']}"
    assert place.found(executable="vllm", env={"PATH": path}).engine.executable == str(place.command)
    place.refused("no-executable", executable="vllm", env={"PATH": "/nonexistent"})


def test_executable_must_exist_and_be_executable(place: Place) -> None:
    """Each way of naming the wrong thing says what to do."""
    assert "does not exist" in place.refused("no-executable", executable=str(place.root / "nope")).text
    venv = place.refused("no-executable", executable=str(place.root / "venv"))
    assert str(place.command) in venv.remedies[0].text
    plain = place.root / "plain"
    plain.touch(mode=0o644)
    assert place.refused("no-executable", executable=str(plain)).remedies[0].text == f"chmod +x {plain}"


@pytest.mark.parametrize(
    ("head", "missing"),
    [
        ("#!/nowhere/bin/python3\n", "/nowhere/bin/python3, which does not exist"),
        ("#! /nowhere/bin/python3 -I\n", "/nowhere/bin/python3, which does not exist"),
        ("#!/usr/bin/env no-such-python\n", "no-such-python, which is not in PATH"),
        (
            '#!/bin/sh\n\'\'\'exec\' "/nowhere/a long/python" "$0" "$@"\n',
            "/nowhere/a long/python, which does not exist",
        ),
        ("#!/etc/passwd\n", "/etc/passwd, which cannot be executed"),
    ],
)
def test_a_script_whose_interpreter_is_gone_is_refused(place: Place, head: str, missing: str) -> None:
    """The kernel says of it that the script does not exist, which it does."""
    script = place.root / "script"
    script.write_text(head)
    script.chmod(0o755)
    cause = place.refused("no-executable", executable=str(script))
    assert f"{script} is run by {missing}" in cause.text
    assert cause.remedies[0].text.startswith("install vLLM anew")


def test_installation_is_found_through_a_link(place: Place) -> None:
    """As pipx and uv make them: a link elsewhere leads to the environment."""
    link = place.root / "bin/vllm"
    link.parent.mkdir()
    link.symlink_to(place.command)
    assert place.found(executable=str(link)).engine.version == "0.32.0+cpu"


def test_installation_is_found_through_the_first_line(place: Place) -> None:
    """A command that was copied out of its environment still names its interpreter, in either form of a long path."""
    moved = place.root / "elsewhere/bin/vllm"
    moved.parent.mkdir(parents=True)
    python = place.command.parent / "python"
    for head in (f"#!{python}\n", f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n"):
        moved.write_text(head)
        moved.chmod(0o755)
        assert place.found(executable=str(moved)).engine.version == "0.32.0+cpu"


def test_installation_by_reference_is_followed(place: Place) -> None:
    """An editable install keeps its sources elsewhere and says where."""
    site = next((place.root / "venv/lib").glob("python3*/site-packages"))
    shutil.move(site / "vllm", place.root / "source tree/vllm")
    info = next(site.glob("*.dist-info"))
    where = {"url": f"file://{place.root}/source%20tree", "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(where))
    assert place.found().engine.flags


def test_what_cannot_be_told_is_not_refused(place: Place) -> None:
    """A wrapper that hides its environment: neither version nor flags, and any flag passes."""
    wrapper = place.root / "wrapper/vllm"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\nexec something\n")
    wrapper.chmod(0o755)
    found = place.found(executable=str(wrapper), args={"no-such-flag": 1})
    assert found.engine.flags is None and found.engine.version == ""


@pytest.mark.parametrize(
    "args",
    [
        {"enforce-eager": True},
        {"enforce_eager": False},
        {"no-enable-prefix-caching": True},
        {"mm-processor-kwargs.max_pixels": 3},
        {"limit-mm-per-prompt": {"image": 1}},
    ],
)
def test_known_flags_pass_in_every_spelling(place: Place, args: dict[str, Any]) -> None:
    """Underscores, --no-flag, and a path into a JSON value are vLLM's own ways."""
    place.found(args=args)


def test_unknown_flag_names_the_nearest(place: Place) -> None:
    """vLLM would exit with 2 after 18 s."""
    cause = place.refused("unknown-flag", args={"enforce-eagre": True})
    assert not cause.heals
    assert "args.enforce-eagre" in cause.text and "did you mean enforce-eager?" in cause.text


def test_short_for_a_flag_is_refused_with_its_full_name(place: Place) -> None:
    """vLLM's parser takes beginnings of flags; so could one of ours be given twice."""
    assert "--kv-cache-memory-bytes" in place.refused("unknown-flag", args={"kv-cache-memory": 1}).text


def test_flags_are_read_anew_when_the_sources_change(place: Place) -> None:
    """An upgrade in place brings other flags."""
    place.refused("unknown-flag", args={"brand-new-flag": 1})
    source = next((place.root / "venv/lib").glob("python3*/site-packages/vllm/engine/arg_utils.py"))
    source.write_text(source.read_text().replace('"--enforce-eager"', '"--brand-new-flag"'))
    place.found(args={"brand-new-flag": 1})


@pytest.mark.skipif(not (REAL / "bin/vllm").exists(), reason="needs a real vLLM installation")
def test_flags_of_a_real_installation() -> None:
    """The true sources yield the true flags: server's, engine's and those of make_arg_parser."""
    facts = read_installation(REAL / "bin/vllm").facts
    assert facts.version.startswith("0.") and facts.flags is not None and len(facts.flags) > 250
    assert {"uds", "shutdown-timeout", "gpu-memory-utilization", "kv-cache-memory-bytes", "headless"} <= facts.flags
    assert "model-weights" not in facts.flags  # a field without a flag
    assert check_flags("m", {"tensor_parallel_size": 2, "no-async-scheduling": True}, facts.flags, "") is None


# -- the model --------------------------------------------------------------------------------------------------------


def test_missing_path_names_the_nearest(place: Place) -> None:
    """A typing error in a path shows what lies beside it."""
    cause = place.refused("no-model", model=str(place.model.parent / "tinny"))
    assert str(place.model) in cause.remedies[0].text and not cause.heals


def test_neither_path_nor_hub_id(place: Place) -> None:
    """What the hub would not take as a name is refused here."""
    place.refused("no-model", model="a/b/c")


def test_broken_config_is_refused(place: Place) -> None:
    """JSON that cannot be read, or none at all."""
    (place.model / "config.json").write_text('{"model_type": ')
    assert "not valid JSON" in place.refused("config-damaged").text
    (place.model / "config.json").unlink()
    place.refused("no-config")


def test_truncated_weights_are_named_with_both_sizes(place: Place) -> None:
    """A download that was cut short: the header promises more than there is."""
    file = place.model / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    cause = place.refused("weights-damaged")
    assert str(file) in cause.text and f"{size - 1000} of {size} bytes" in cause.text


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"{"]
)
def test_hostile_headers_are_damage(place: Place, content: bytes) -> None:
    """No content of a weight file raises anything else, nor reads more than the file has."""
    (place.model / "model.safetensors").write_bytes(content)
    place.refused("weights-damaged")


def test_missing_weights_are_refused(place: Place) -> None:
    """No file at all, or fewer than the index names."""
    index = {"metadata": {"total_size": 10}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (place.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-2.safetensors" in place.refused("weights-missing").text
    (place.model / "model.safetensors.index.json").unlink()
    (place.model / "model.safetensors").unlink()
    place.refused("weights-missing")


def test_weights_are_summed_over_shards_as_loaded(tmp_path: Path) -> None:
    """float32 tensors are halved on loading unless float32 is asked for."""
    model = make_model(tmp_path / "m", torch_dtype="float32")
    half = read_model("m", model, {})
    full = read_model("m", model, {"dtype": "float32"})
    assert isinstance(half, ModelFacts) and isinstance(full, ModelFacts)
    assert half.weights and full.weights == 2 * half.weights  # the file itself holds bfloat16


def test_fingerprint_changes_with_the_files(place: Place) -> None:
    """What was learned of other weights does not count."""
    before = place.found().model.fingerprint
    assert before == place.found().model.fingerprint
    make_model(place.model, layers=3)
    assert place.found().model.fingerprint != before


def cached(root: Path, model: Path | None, name: str = "org/name") -> Path:
    """A hub cache below `root` with this repository in it; the snapshot's folder."""
    repository = root / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots/c0ffee"
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("c0ffee")
    shutil.copytree(model, snapshot) if model else snapshot.mkdir()
    return snapshot


@pytest.mark.parametrize("where", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME", "download-dir"])
def test_hub_cache_is_found_wherever_it_is_set(place: Place, where: str) -> None:
    """The order of huggingface_hub, and vLLM's own flag; the model's env counts."""
    root = place.root / "data"
    below = {"XDG_CACHE_HOME": "huggingface", "HOME": ".cache/huggingface"}.get(where, "")
    snapshot = cached(root / below, place.model)
    value = str(root / "hub" if where in ("HF_HUB_CACHE", "download-dir") else root)
    more = {"args": {where: value}} if where == "download-dir" else {"env": {where: value}}
    assert place.found(model="org/name", **more).model.path == str(snapshot)


def test_not_downloaded_and_offline(place: Place) -> None:
    """HF_HUB_OFFLINE forbids what would be needed; online it is left to vLLM."""
    home = {"HF_HOME": str(place.root / "data")}
    assert (
        "is not downloaded"
        in place.refused("not-downloaded", model="org/name", env=home | {"HF_HUB_OFFLINE": "1"}).text
    )
    assert place.found(model="org/name", env=home).model == ModelFacts(None)


def test_partly_downloaded_model_tells_what_it_can(place: Place) -> None:
    """The index is there, the weights are not: size and configuration are known, the path is not."""
    snapshot = cached(place.root / "data", None)
    shutil.copy(place.model / "config.json", snapshot)
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model-1.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    env = {"HF_HOME": str(place.root / "data")}
    facts = place.found(model="org/name", env=env).model
    assert facts.path is None and facts.weights == 12345 and facts.config["model_type"] == "llama"
    cause = place.refused("not-downloaded", model="org/name", env=env | {"HF_HUB_OFFLINE": "1"})
    assert "only partly downloaded" in cause.text


def test_download_larger_than_the_disk(place: Place) -> None:
    """A known size that the cache's disk cannot take is refused before hours of download."""
    snapshot = cached(place.root / "data", None)
    index = {"metadata": {"total_size": 1 << 60}, "weight_map": {"a": "model-1.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    cause = place.refused("no-disk", model="org/name", env={"HF_HOME": str(place.root / "data")})
    assert "to download" in cause.text and cause.heals


def test_an_object_store_is_left_to_vllm(place: Place) -> None:
    """s3:// and the like cannot be looked at."""
    assert place.found(model="s3://bucket/model").model == ModelFacts(None)


def test_context_beyond_the_model(place: Place) -> None:
    """The limit is named; forcing it is the operator's right."""
    cause = place.refused("context-too-long", max_model_len=4096)
    assert cause.remedies[0].text == "models.m.max_model_len = 2048" and not cause.heals
    place.found(max_model_len=2048)
    place.found(max_model_len=4096, env={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"})
    place.found(max_model_len=4096, args={"hf-overrides": {"max_position_embeddings": 4096}})


def transformers(place: Place, *, old: bool = False) -> None:
    """Put the tables beside the fake vLLM that tell which configurations need no code of the model's."""
    site = next((place.root / "venv/lib").glob("python3*/site-packages"))
    for name, text in {
        "vllm/transformers_utils/config.py": 'R = Lazy(chatglm="ChatGLMConfig")',
        "transformers/models/auto/configuration_auto.py": 'NAMES = OrderedDict([("llama", "LlamaConfig")])',
        "transformers/dynamic_module_utils.py": "" if old else 'name.replace(".", "_dot_")',
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)


def with_code(place: Place, kind: str) -> None:
    make_model(place.model, model_type=kind, auto_map={"AutoConfig": "configuration_x.XConfig"})


def test_remote_code_needs_leave(place: Place) -> None:
    """Only a configuration that neither vLLM nor transformers knows; and nothing is refused when that cannot be told."""
    with_code(place, "dots_ocr")
    place.found()
    transformers(place)
    cause = place.refused("needs-remote-code")
    assert "trust-remote-code = true" in cause.remedies[0].text
    place.found(args={"trust-remote-code": True})
    for known in ("llama", "chatglm"):
        with_code(place, known)
        place.found()


def test_a_dot_in_the_name_breaks_old_transformers(place: Place) -> None:
    """Remote code is imported under its folder's name; newer transformers rewrite the dot."""
    place.model = place.model.rename(place.model.with_name("dots.ocr"))
    with_code(place, "dots_ocr")
    transformers(place, old=True)
    cause = place.refused("dot-in-name", args={"trust-remote-code": True})
    assert "dots_ocr" in cause.remedies[0].text
    transformers(place)
    place.found(args={"trust-remote-code": True})


# -- the machine ------------------------------------------------------------------------------------------------------


def test_compiler_is_needed_unless_eager(place: Place) -> None:
    """The CPU build compiles with g++; enforce-eager does without."""
    env = {"PATH": str(place.command.parent)}
    cause = place.refused("no-compiler", env=env)
    assert any("enforce-eager = true" in remedy.text for remedy in cause.remedies)
    place.found(env=env, args={"enforce-eager": True})
    place.found(env=env | {"CXX": "python"})


def test_full_disk_names_directory_and_bytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than 64 MiB for logs, state or caches is refused; it may heal."""
    real = os.statvfs

    def full(path: Any) -> Any:
        found = real(path)
        return os.statvfs_result((*found[:3], 10, 10, *found[5:]))

    monkeypatch.setattr(os, "statvfs", full)
    cause = place.refused("no-disk")
    assert str(place.root) in cause.text and str(10 * real(place.root).f_frsize) in cause.text and cause.heals


def test_unwritable_directory(place: Place) -> None:
    """A file where a directory should be, as any place that cannot be written to."""
    (place.root / "log").touch()
    assert "not writable" in place.refused("no-disk").text


@pytest.fixture
def listener() -> Any:
    """A socket that listens, on a port of the kernel's choice."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_port_of_a_stranger_is_named(place: Place, listener: socket.socket) -> None:
    """Who listens there is found by the socket's inode; a taken port may become free."""
    port = listener.getsockname()[1]
    cause = place.refused("port-taken", port=port)
    assert f"port {port} is taken by" in cause.text and f"(pid {os.getpid()})" in cause.text and cause.heals


def test_port_that_is_bound_but_silent(place: Place) -> None:
    """A vLLM that still loads has bound its port with SO_REUSEADDR and listens nowhere."""
    with socket.socket() as loading:
        loading.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        loading.bind(("127.0.0.1", 0))
        assert "does not listen yet" in place.refused("port-taken", port=loading.getsockname()[1]).text


def test_lingering_connections_do_not_take_a_port(place: Place) -> None:
    """After a server closed its connections they linger for a minute; a restart does not wait for that."""
    server = socket.create_server(("127.0.0.1", 0))
    port: int = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    accepted.close()
    assert client.recv(1) == b""
    client.close()
    server.close()
    assert wait_for(lambda: not ports.can_bind(port))
    assert place.found(port=port).port == port


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within 10 s."""
    end = time.monotonic() + 10
    while not (met := condition()) and time.monotonic() < end:
        os.sched_yield()
    return met


def test_port_of_another_model(place: Place) -> None:
    """One port is never given to two instances."""
    assert "taken by vlm" in place.refused("port-taken", port=28400, taken={28400: "vlm"}).text


def test_auto_port_is_free_and_nobody_elses(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """port = "auto": the kernel's choice, but none that another instance was promised."""
    port = place.found(port=0).port
    assert port and ports.can_bind(port)
    monkeypatch.setattr(ports, "TRIES", 3)
    everything = dict.fromkeys(range(1, 65536), "vlm")
    assert isinstance(place.look(port=0, taken=everything), Cause)


def test_unreadable_model_is_a_cause(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What our user may not read is said, not raised."""

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(place.model))

    monkeypatch.setattr("vllmd.edge.hub.read_model", forbidden)
    assert f"cannot read {place.model}: Permission denied" in place.refused("unreadable").text
