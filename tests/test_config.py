"""Loading: what a file means, and how a mistake in it is told."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vllmd.config.load import ConfigError, find_config, load
from vllmd.spec import DeviceRule, Overrun, RestartRule, Settings, Share

Check = Callable[..., Settings]
GIB = 1 << 30
NONE: Mapping[str, str] = {}


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Load a text (and drop-ins) as a file in tmp_path, as nobody in particular."""

    def run(text: str, env: Mapping[str, str] = NONE, drop_ins: Mapping[str, str] = NONE, **more: Any) -> Settings:
        file = tmp_path / "vllmd.toml"
        file.write_text(text)
        (tmp_path / "vllmd.toml.d").mkdir(exist_ok=True)
        for name, content in drop_ins.items():
            (tmp_path / "vllmd.toml.d" / name).write_text(content)
        base = {"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/7"}
        return load(file, root=False, env={**base, **env}, **more)

    return run


def told(run: Callable[[], object], folder: Path) -> list[str]:
    """The problems' sentences, with the folder taken out."""
    with pytest.raises(ConfigError) as caught:
        run()
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


MODEL = '[models.ocr]\nmodel = "owner/name"\n'  # a mistake in a model's key then stands on line 3


def test_an_empty_file_is_a_configuration(check: Check) -> None:
    """Every key has a default; no model is needed."""
    settings = check("")
    assert settings.models == {} and settings.devices == {}
    assert settings.http.listen == (("127.0.0.1", 8400),)
    assert settings.warnings == ()


def test_values_are_typed(check: Check, tmp_path: Path) -> None:
    """Sizes become bytes, durations seconds, "auto" None; a model is what its table and [defaults] say."""
    settings = check("""
        [devices."*"]
        reserve = "512MiB"
        [devices.cpu]
        limit = "8GiB"
        [defaults]
        env = { A = "1", B = "1" }
        args = { seed = 1, enforce-eager = true }
        restart = { max_failures = 2 }
        drain = "1m30s"
        [models.ocr]
        model = "./models/ocr"
        category = "ocr"
        vram = "7GiB"
        gpus = [0, "GPU-12ab"]
        port = "auto"
        env = { B = "2" }
        args = { max_num_seqs = 2, enforce-eager = false, limit-mm-per-prompt = { image = 1 } }
        restart = { window = "1h" }
        on_overrun = "stop"
        [models."chat.v2"]
        model = "Qwen/Qwen3-0.6B"
        vram = "50%"
        executable = "~/bin/vllm"
        """)
    assert settings.devices == {"*": DeviceRule(reserve=512 << 20), "cpu": DeviceRule(limit=8 * GIB)}
    ocr, chat = settings.models.values()
    assert (ocr.name, ocr.model, ocr.category) == ("ocr", str(tmp_path / "models/ocr"), ("ocr",))
    assert (ocr.vram, ocr.gpus, ocr.port, ocr.drain) == (7 * GIB, ("0", "GPU-12ab"), 0, 90.0)
    assert dict(ocr.env) == {"A": "1", "B": "2"}
    assert dict(ocr.args) == {
        "seed": 1, "enforce-eager": False, "max-num-seqs": 2, "limit-mm-per-prompt": {"image": 1},
    }  # fmt: skip
    assert ocr.restart == RestartRule(max_failures=2, window=3600.0)
    assert ocr.on_overrun is Overrun.STOP
    assert (chat.name, chat.vram, chat.executable) == ("chat.v2", Share(0.5), "/home/ada/bin/vllm")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('vram = "9 Gb"', 'models.ocr.vram: "9 Gb" is not a size (try "9GiB")'),
        ("vram = 9", 'models.ocr.vram: 9 is not a size (try "9GiB")'),
        ("vram = 8589934592", 'models.ocr.vram: 8589934592 is not a size (try "8GiB")'),
        ('vram = "9iB"', 'models.ocr.vram: "9iB" is not a size (try "9GiB")'),
        ('vram = "\\u0000"', r'models.ocr.vram: "\u0000" is not a size (try "9GiB" or "512MiB")'),
        (f'vram = "{"9" * 400}GiB"', f'models.ocr.vram: "{"9" * 76}... is too large'),
        ('on_overrun = "a\\u001b[31m\\u009b"',
         r'models.ocr.on_overrun: "a\u001b[31m\u009b" is not one of them ("warn", "restart" or "stop")'),
        ("vram = 1.5", 'models.ocr.vram: 1.5 is not a part of the budget (from "1%" to "100%", or 0.01 to 1.0)'),
        ('vram = "0GiB"', "models.ocr.vram: out of range: must be from 1B to 1024TiB"),
        ("drain = 30", 'models.ocr.drain: 30 is not a duration (try "30s")'),
        ('hang_after = "soon"', 'models.ocr.hang_after: "soon" is not a duration (try "180s", "10m" or "1h30m")'),
        ('hang_after = "1s"', "models.ocr.hang_after: out of range: must be from 5s to 1d"),
        ("port = 80", "models.ocr.port: out of range: must be from 1024 to 65535"),
        ('port = "8000"', 'models.ocr.port: "8000" is not a whole number from 1024 to 65535 or "auto" (try 8000)'),
        ('autostart = "yes"', 'models.ocr.autostart: "yes" is not true or false (try true)'),
        ('on_overrun = "kill"', 'models.ocr.on_overrun: "kill" is not one of them ("warn", "restart" or "stop")'),
        ('gpus = "0"', 'models.ocr.gpus: "0" does not name GPUs (try ["0"])'),
        ('gpus = ["cpu", 0]', 'models.ocr.gpus: "cpu" cannot be mixed with GPUs'),
        ('gpus = [0, "first"]',
         'models.ocr.gpus[1]: "first" is not a device (an index, a UUID ("GPU-...", "MIG-...") or "cpu")'),
        ('category = ["OCR"]', 'models.ocr.category[0]: "OCR" is not a category in lower case (try "ocr")'),
        ("max_model_lenght = 1", "models.ocr.max_model_lenght: unknown key (did you mean max_model_len?)"),
        ('listen = ["x"]', "models.ocr.listen: unknown key (it belongs into [http])"),
        ("gpu_memory_utilization = 0.9", "models.ocr.gpu_memory_utilization: unknown key (vllmd computes it; write vram)"),
        ("tensor_parallel_size = 2", "models.ocr.tensor_parallel_size: unknown key (write gpus)"),
        ("tp = 2", "models.ocr.tp: unknown key (write gpus)"),
        ("max-model-len = 5", "models.ocr.max-model-len: unknown key (write the key max_model_len)"),
        ("max_num_seqs = 2", "models.ocr.max_num_seqs: unknown key (a flag of vLLM goes into args = { max-num-seqs = 2 })"),
        ("enforce-eager = true",
         "models.ocr.enforce-eager: unknown key (a flag of vLLM goes into args = { enforce-eager = true })"),
        ('dtype = "half"', 'models.ocr.dtype: unknown key (a flag of vLLM goes into args = { dtype = "half" })'),
        ('kv_cache_dtype = "fp8"',
         'models.ocr.kv_cache_dtype: unknown key (a flag of vLLM goes into args = { kv-cache-dtype = "fp8" })'),
        ("limit_mm_per_prompt = { image = 1 }",
         "models.ocr.limit_mm_per_prompt: unknown key (a flag of vLLM goes into args = { limit-mm-per-prompt = ... })"),
        ("kv_cache_siz = 1", "models.ocr.kv_cache_siz: unknown key (did you mean kv_cache?)"),
        ('restart = { backof = "1s" }', "models.ocr.restart.backof: unknown key (did you mean backoff?)"),
        ('restart = { backoff = "400s" }',
         "models.ocr.restart: backoff is longer than backoff_max (lower backoff or raise backoff_max)"),
        ("env = { A = 2 }", 'models.ocr.env.A: 2 is not a string (try "2")'),
        ('env = { TMPDIR = "/x" }',
         "models.ocr.env.TMPDIR: TMPDIR is set by vllmd (vllmd gives each engine its own directory)"),
        ('env = { VLLMD_X = "1" }',
         "models.ocr.env.VLLMD_X: VLLMD_X is set by vllmd (names that begin with VLLMD_ are its own)"),
        ("args = { gpu_memory_utilization = 0.9 }",
         "models.ocr.args.gpu_memory_utilization: --gpu-memory-utilization is set by vllmd "
         "(vllmd computes it; write vram)"),
        ("args = { no-enable-sleep-mode = true }",
         "models.ocr.args.no-enable-sleep-mode: --no-enable-sleep-mode is set by vllmd (write swap)"),
        ("args = { gpu-memory = 0.9 }",
         "models.ocr.args.gpu-memory: --gpu-memory abbreviates --gpu-memory-utilization, which is set by vllmd "
         "(vllmd computes it; write vram)"),
        ("args = { --enforce_eager = true }",
         "models.ocr.args.--enforce_eager: flags are written without dashes in front (try enforce-eager)"),
        ("args = { -tp = 2 }", "models.ocr.args.-tp: --tensor-parallel-size is set by vllmd (write gpus)"),
        ("args = { enforce-eager = true, enforce_eager = true }",
         "models.ocr.args.enforce_eager: --enforce-eager stands here twice (as enforce-eager and as enforce_eager)"),
        ("args = { no-enforce-eager = true, enforce-eager = true }",
         "models.ocr.args.enforce-eager: --enforce-eager stands here twice (as no-enforce-eager and as enforce-eager)"),
        ('args = { chat-template = ["a", "--host"] }',
         'models.ocr.args.chat-template[1]: "--host" would be read as a flag, not as a value'),
        ("args = { x = 1979-05-27 }",
         "models.ocr.args.x: 1979-05-27 cannot be passed to vLLM (a string, number, true, false, list or table)"),
        ("replicas = { min = 3, max = 2 }", "models.ocr.replicas: out of range: 0 <= min <= max, and max from 1 to 64"),
        ('kv_cache = "9GiB"\nvram = "9GiB"',
         "models.ocr.kv_cache: 9.0 GiB of KV cache leave nothing of the 9.0 GiB of vram for the model itself "
         "(lower kv_cache or raise vram)"),
        ("port = 8400", 'models.ocr.port: 8400 is the port of http.listen already (give each its own, or "auto")'),
    ],
)  # fmt: skip
def test_a_mistake_in_a_model_is_told_with_place_and_way_out(
    check: Check, tmp_path: Path, line: str, message: str
) -> None:
    """file:line: key: what is wrong (what is right)."""
    assert told(lambda: check(MODEL + line), tmp_path) == [f"vllmd.toml:3: {message}"]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("daemon = 3", ["1: daemon: 3 is not a table (open it with [daemon])"]),
        ("models = [1]", ["1: models: an array is not a table (open one with [models.NAME])"]),
        ("[modles.a]", ["1: modles: unknown table (did you mean [models]?)"]),
        ('[deamon]\nlog_levle = "info"\nlog_keep = 0', [
            "1: deamon: unknown table (did you mean [daemon]?)",
            "2: deamon.log_levle: unknown key (did you mean log_level?)",
            "3: deamon.log_keep: out of range: must be from 1 to 1000"]),
        ('[modles.A]\nvrma = "1GiB"\nport = 80', [
            "1: modles: unknown table (did you mean [models]?)",
            '1: modles.A: "A" is not a model\'s name '
            '(lower-case letters, digits, ., _ and -, at most 63, the first a letter or digit; try "a")',
            "2: modles.A.vrma: unknown key (did you mean vram?)",
            "3: modles.A.port: out of range: must be from 1024 to 65535"]),
        ('[defalts]\nvrma = 1', [
            "1: defalts: unknown table (did you mean [defaults]?)", "2: defalts.vrma: unknown key (did you mean vram?)"]),
        ('[models.a]\nmodel = "a/b"\ncategory = ["ocr", "OCR", "ocr"]', [
            '3: models.a.category[1]: "OCR" is not a category in lower case (try "ocr")',
            '3: models.a.category[2]: "ocr" stands here twice']),
        ('[models.gpt.oss_20b]\nmodel = "a/b"', [
            "1: models.gpt.oss_20b: unknown key (a model's name with a dot needs quotes: [models.\"a.b\"])"]),
        ("listen = []", ["1: listen: unknown key (it belongs into [http])"]),
        ("[models.a]", ['1: models.a: needs the key model (model = "owner/name" or a path)']),
        ('[models.a]\nmodel = "a b"', [
            '2: models.a.model: "a b" is neither a hub id nor a path (owner/name, ./folder or /folder)']),
        ('[models.Big]\nmodel = "a/b"', [
            '1: models.Big: "Big" is not a model\'s name '
            '(lower-case letters, digits, ., _ and -, at most 63, the first a letter or digit; try "big")']),
        ('[models.qwen2.5]\nmodel = "a/b"', [
            "1: models.qwen2.5: unknown key (a model's name with a dot needs quotes: [models.\"a.b\"])"]),
        ('[devices.gpu0]', ['1: devices.gpu0: "gpu0" is not a device '
                            '("*" for all, an index, a UUID ("GPU-...", "MIG-...") or "cpu")']),
        ('[http]\nlisten = "127.0.0.1:1"', [
            '2: http.listen: "127.0.0.1:1" is not a list of addresses (try ["127.0.0.1:1"])']),
        ('[http]\nlisten = ["[::1]:8400",\n "0.0.0.0:80"]', [
            "3: http.listen[1]: 0.0.0.0:80 is open to other machines, which needs an API key "
            "(`vllmctl key NAME` makes one; or listen on 127.0.0.1:80)"]),
        ('[http]\nlisten = [":8400"]', [
            "2: http.listen[0]: :8400 is open to other machines, which needs an API key "
            "(`vllmctl key NAME` makes one; or listen on 127.0.0.1:8400)"]),
        ('[http]\ntls_cert = "c.pem"', ["2: http.tls_cert: needs tls_key as well"]),
        ('[http]\ntls_cert = 5\ntls_key = "k.pem"', ['2: http.tls_cert: 5 is not a path (try "5")']),
        ('[http]\nmemory = "100MiB"\nmax_body = "200MiB"', [
            "3: http.max_body: no request of 0.2 GiB would ever be let in: all together may take 0.1 GiB "
            "(lower max_body or raise memory)"]),
        ('[http]\nhosts = ["a:1"]', [
            '2: http.hosts[0]: "a:1" is not a host\'s name (such as "models.example.org", without a port)']),
        ('[http]\norigins = ["ui.example"]', [
            '2: http.origins[0]: "ui.example" is not an origin (such as "https://ui.example.org")']),
        ('[keys.a]\nhash = "secret-key-in-clear"', [
            '2: keys.a.hash: is not "sha256:" and 64 hex digits (`vllmctl key NAME` makes a key and prints the line)']),
        ("[keys.a]", ["1: keys.a: needs the key hash (`vllmctl key NAME` makes a key and prints the line)"]),
        (f'[models.ocr]\nmodel = "a/b"\n[keys.a]\nhash = "sha256:{"0" * 64}"\nscopes = ["all"]\nmodels = ["orc"]', [
            '5: keys.a.scopes[0]: "all" is no scope (infer, read or admin)',
            '6: keys.a.models: no model is called "orc" (did you mean ocr?)']),
        ('[models.ocr]\nmodel = "a/b"\naliases = { "x y" = {}, z = { force = { model = "q" } }, w = { forse = {} } }', [
            '3: models.ocr.aliases."x y": "x y" is not an alias',
            '3: models.ocr.aliases.w: unknown key "forse" (defaults, force, drop)',
            "3: models.ocr.aliases.z: force: the model is what an alias stands for"]),
        ('[http]\nlisten = ["myhost:1"]', [
            '2: http.listen[0]: "myhost:1" is not an address (an IP address: "127.0.0.1:8400" or "[::1]:8400")']),
        ('[daemon]\nsocket = "/' + "x" * 120 + '"', [
            "2: daemon.socket: a path of 121 bytes is too long for a unix socket (at most 100 bytes)"]),
        ('[daemon]\nlog_dir = "~eve/x"', [
            '2: daemon.log_dir: "~eve/x": only one\'s own home can be written with ~ (write the whole path)']),
        ('[devices."*"]\nlimit = "4GiB"\n[models.a]\nmodel = "a/b"\nvram = "5GiB"', [
            "5: models.a.vram: 5.0 GiB can never fit: all models together may use 4.0 GiB of a device "
            '(raise limit in [devices."*"])']),
        ('[devices."*"]\nlimit = "10GiB"\n[defaults]\nmodel = "a/b"\nvram = "6GiB"\npinned = true\ngpus = [0]\n'
         "[models.a]\n[models.b]\n[models.c]\npinned = false", [
            "6: defaults.pinned: a, b are pinned and need 12.0 GiB together; models may use 10.0 GiB of device 0 "
            '(unpin one, lower vram, or raise limit in devices."*")']),
        ('[devices.cpu]\nlimit = "10GiB"\n[defaults]\nmodel = "a/b"\nvram = "6GiB"\ngpus = ["cpu"]\n'
         "[models.a]\npinned = true\n[models.b]\npinned = true", [
            "10: models.b.pinned: a, b are pinned and need 12.0 GiB together; models may use 10.0 GiB of device cpu "
            "(unpin one, lower vram, or raise limit in devices.cpu)"]),
        ('[models.a]\nmodel = "a/b"\nport = 8000\n[models.b]\nmodel = "a/b"\nport = 8000', [
            '6: models.b.port: 8000 is the port of models.a already (give each its own, or "auto")']),
        ('[models.a]\nmodel = "a/b"\naliases = ["b", "c"]\n[models.b]\nmodel = "a/b"\naliases = ["c"]', [
            '3: models.a.aliases: "b" is the name of models.b already',
            '6: models.b.aliases: "c" is an alias of models.a already']),
    ],
)  # fmt: skip
def test_a_mistake_elsewhere_is_told_too(check: Check, tmp_path: Path, text: str, messages: list[str]) -> None:
    """Tables, names, addresses, paths, and what must hold between values."""
    assert told(lambda: check(text), tmp_path) == [f"vllmd.toml:{message}" for message in messages]


def test_a_file_that_cannot_be_read_is_a_problem_like_any_other(tmp_path: Path) -> None:
    """No other exception than ConfigError: neither for a missing file nor for a directory."""
    file = tmp_path / "none.toml"
    assert told(lambda: load(file, env={}), tmp_path) == ["none.toml: cannot be read: No such file or directory"]
    assert told(lambda: load(tmp_path, env={}), tmp_path.parent)[0].endswith(": cannot be read: Is a directory")


@pytest.mark.parametrize(("root", "where"), [(True, "it"), (False, "/home/ada/.config/vllmd/vllmd.toml")])
def test_a_default_file_that_is_missing_says_where_it_may_be(root: bool, where: str) -> None:
    """And what to begin with; a file that was named is just not there."""
    env = {"HOME": "/home/ada"}
    path = find_config(env, root=root)
    if path.exists():
        pytest.skip("a vllmd of the machine is there")
    (problem,) = told(lambda: load(path, root=root, env=env), Path("/"))
    assert (
        f"(write {where}, or name a file with --config; etc/vllmd.toml of the source is a commented example)" in problem
    )


def test_a_key_without_effect_is_a_warning_where_it_differs_from_its_default(check: Check, tmp_path: Path) -> None:
    """What waits for a later version is checked, typed, and said to do nothing yet."""
    settings = check(MODEL + 'environment = "e"\npinned = false\nreplicas = 2\nttl = "15m"\n')
    file = tmp_path / "vllmd.toml"
    assert settings.warnings == (
        f"{file}:3: models.ocr.environment: understood, no effect in this version "
        "(environments come in a later version; use executable)",
        f"{file}:5: models.ocr.replicas: understood, no effect in this version (replicas come in a later version)",
    )
    assert (settings.models["ocr"].ttl, settings.models["ocr"].replicas) == (900.0, (2, 2))


@pytest.mark.parametrize(
    "change",
    [
        ("gpus = [0]", 'gpus = "auto"'),  # each may have a device of its own
        ("gpus = [0]", "gpus = [1]"),
        ('vram = "6GiB"', 'vram = "5GiB"'),
        ('vram = "6GiB"', 'vram = "auto"'),
        ('[devices."*"]', '[devices."GPU-1"]\n[devices."*"]'),  # which may be what is called 0 here
    ],
)
def test_pinned_models_are_refused_only_where_it_is_certain(check: Check, change: tuple[str, str]) -> None:
    """On one device by name, with sizes that are given, under a limit that surely holds there."""
    text = """
        [devices."*"]
        limit = "10GiB"
        [models.a]
        model = "a/b"
        vram = "6GiB"
        gpus = [0]
        pinned = true
        [models.b]
        model = "a/b"
        vram = "5GiB"
        gpus = [0]
        pinned = true
    """
    with pytest.raises(ConfigError):
        check(text)
    check(text.replace(*change, 1))


def test_what_is_surely_not_meant_is_a_warning(check: Check, tmp_path: Path) -> None:
    """It works as it says, and that helps nobody. A default that one model has no use for is nothing strange."""
    settings = check(MODEL + "pinned = true\nhome = true\n[http]\nopen_loopback = false")
    assert settings.warnings == (
        f"{tmp_path}/vllmd.toml:4: models.ocr.home: no effect: a pinned model never makes room (leave out home)",
        f"{tmp_path}/vllmd.toml:6: http.open_loopback: nobody can ask over TCP without a key "
        "(`vllmctl key NAME` makes a key and prints the line)",
    )
    quiet = f'[keys.a]\nhash = "sha256:{"0" * 64}"\n[http]\nopen_loopback = false\n[defaults]\nhome = true\n'
    assert check(quiet + MODEL + "pinned = true").warnings == ()


def test_a_request_is_never_larger_than_the_memory_for_all(check: Check) -> None:
    """Who only lowers the one is not told to lower the other."""
    assert check('[http]\nmemory = "64MiB"').http.max_body == 64 << 20
    assert check('[http]\nmemory = "1GiB"').http.max_body == 256 << 20


# -- drop-ins and overrides -------------------------------------------------------------------------------------------


def test_drop_ins_merge_in_name_order(check: Check, tmp_path: Path) -> None:
    """Tables merge, scalars and arrays are replaced; only *.toml that are not hidden count; all are in `files`."""
    settings = check(
        MODEL + 'category = ["ocr", "vlm"]\nvram = "1GiB"\nargs = { seed = 1 }',
        drop_ins={
            "20.toml": '[models.ocr]\nvram = "3GiB"\nargs = { max-num-seqs = 4 }',
            "10.toml": '[models.ocr]\nvram = "2GiB"\ncategory = ["ocr"]\n[models.b]\nmodel = "a/b"',
            "note.txt": "not TOML",
            ".30.toml": "nor this",
        },
    )
    ocr = settings.models["ocr"]
    assert (ocr.vram, ocr.category, dict(ocr.args)) == (3 * GIB, ("ocr",), {"seed": 1, "max-num-seqs": 4})
    assert list(settings.models) == ["ocr", "b"]
    folder = tmp_path / "vllmd.toml.d"
    assert settings.files == (tmp_path / "vllmd.toml", folder / "10.toml", folder / "20.toml")


@pytest.mark.parametrize(
    ("base", "above", "args"),
    [
        ("max_num_seqs = 1, seed = 3", "max-num-seqs = 2", {"seed": 3, "max-num-seqs": 2}),
        ("max-num-seqs = 1", "max_num_seqs = 2", {"max-num-seqs": 2}),
        ("enforce-eager = true", "no-enforce-eager = true", {"enforce-eager": False}),
        ("no_enforce_eager = true", "enforce-eager = true", {"enforce-eager": True}),
        ("hf-overrides = { a_b = 1 }", "hf_overrides = { c = 2 }", {"hf-overrides": {"c": 2}}),
    ],
)
def test_a_drop_in_overrides_a_flag_however_it_is_spelt(
    check: Check, base: str, above: str, args: dict[str, Any]
) -> None:
    """In a model and in [defaults], and a model those of [defaults]."""
    for table in ("models.ocr", "defaults"):
        drop_ins = {"1.toml": f"[{table}]\nargs = {{ {above} }}"}
        settings = check(f"{MODEL}[{table}.args]\n{base.replace(', ', chr(10))}", drop_ins=drop_ins)
        assert dict(settings.models["ocr"].args) == args
    settings = check(f"{MODEL}args = {{ {above} }}\n[defaults]\nargs = {{ {base} }}")
    assert dict(settings.models["ocr"].args) == args


def test_a_problem_is_located_in_the_file_that_it_stands_in(check: Check, tmp_path: Path) -> None:
    """Also what a later file replaces, what two files do to each other, and syntax errors; by file and line."""
    problems = told(
        lambda: check(
            MODEL + 'vram = "x"\nport = 8000\ndrain = "30s',
            drop_ins={
                "1.toml": '[models.ocr]\nvram = "1GiB"\n[models.b]\nmodel = "a/b"\nport = 8000',
                "2.toml": '# a name that does not exist yet\n[models.orc]\nvram = "2GiB"\nhang_after = 3',
            },
        ),
        tmp_path,
    )
    assert problems == [
        'vllmd.toml:3: models.ocr.vram: "x" is not a size (try "9GiB" or "512MiB")',
        "vllmd.toml:5: models.ocr.drain: the string is not closed (end it with the quotes it began with)",
        'vllmd.toml.d/1.toml:5: models.b.port: 8000 is the port of models.ocr already (give each its own, or "auto")',
        'vllmd.toml.d/2.toml:2: models.orc: needs the key model (model = "owner/name" or a path)',
        'vllmd.toml.d/2.toml:4: models.orc.hang_after: 3 is not a duration (try "3s")',
    ]


def test_a_table_is_located_where_it_was_opened(check: Check, tmp_path: Path) -> None:
    """What a drop-in adds to a model does not make it the drop-in's."""
    problems = told(
        lambda: check("# one\n[models.a]\nport = 8000", drop_ins={"1.toml": '[models.a]\nvram = "1GiB"'}), tmp_path
    )
    assert problems == ['vllmd.toml:2: models.a: needs the key model (model = "owner/name" or a path)']


def test_a_relative_path_starts_at_the_folder_of_its_own_file(check: Check, tmp_path: Path) -> None:
    """A drop-in's is the drop-in folder."""
    settings = check(
        MODEL + 'executable = "bin/vllm"', drop_ins={"1.toml": '[models.b]\nmodel = "./b"\nexecutable = "vllm"'}
    )
    assert settings.models["ocr"].executable == str(tmp_path / "bin/vllm")
    assert settings.models["b"].model == str(tmp_path / "vllmd.toml.d" / "b")
    assert settings.models["b"].executable == "vllm"


def test_the_command_line_goes_over_all_files(check: Check, tmp_path: Path) -> None:
    """An override is checked like a file and located on the command line."""
    assert check('[daemon]\nsocket = "/a"', overrides={"daemon.socket": "/b"}).daemon.socket == Path("/b")
    assert told(lambda: check("", overrides={"daemon.sokcet": "/b"}), tmp_path) == [
        "command line: daemon.sokcet: unknown key (did you mean socket?)"
    ]


def test_content_is_checked_in_place_of_the_file(tmp_path: Path) -> None:
    """A configuration can be validated before it is written."""
    assert list(load(tmp_path / "x.toml", content=MODEL.encode(), env={}).models) == ["ocr"]


# -- substitutions ----------------------------------------------------------------------------------------------------


def test_substitutions_are_filled_in_and_those_of_env_are_secrets(check: Check, tmp_path: Path) -> None:
    """${env:} anywhere but in args, ${credential:} in env tables; whole values and parts of env are known as secret."""
    (tmp_path / "hf").write_text("hf_abc\n")
    settings = check(
        '[models.a]\nmodel = "${env:ROOT}/m"\n'
        'env = { T = "Bearer ${credential:hf}", U = "${env:USER_KEY}", V = "plain" }',
        env={"ROOT": "/srv", "USER_KEY": "k3y", "CREDENTIALS_DIRECTORY": str(tmp_path)},
    )
    assert settings.models["a"].model == "/srv/m"
    assert dict(settings.models["a"].env) == {"T": "Bearer hf_abc", "U": "k3y", "V": "plain"}
    assert settings.secrets == {"Bearer hf_abc", "hf_abc", "k3y"}
    assert all(type(value) is str for value in settings.models["a"].env.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('executable = "${env:NONE}"', 'executable: "${env:NONE}": no such variable in vllmd\'s environment'),
        ('executable = "${HOME}"',
         'executable: "${HOME}" is not a substitution (only ${env:NAME} and ${credential:NAME} are substituted)'),
        ('executable = "${env:X"',
         'executable: "${env:X" is not a substitution (only ${env:NAME} and ${credential:NAME} are substituted)'),
        ('executable = "${credential:hf}"',
         'executable: "${credential:hf}" would be seen by others (credentials go into an env table)'),
        ('env = { A = "${credential:../x}" }', 'env.A: "${credential:../x}": not the name of a credential'),
        ('env = { A = "${credential:none}" }',
         'env.A: "${credential:none}": cannot be read: No such file or directory '
         "(a file none in /etc/vllmd/credentials, or LoadCredential=none:/path in vllmd.service)"),
        ('args = { revision = "${env:SECRET}" }',
         "args.revision: a substitution would show in the process list (write it into env, or as it is)"),
        ('vram = "${env:SECRET}"', 'vram: "${env:SECRET}" does not become a size (such as "9GiB")'),
        ('drain = "${env:SECRET}"', 'drain: "${env:SECRET}" does not become a duration (such as "180s")'),
        ('on_overrun = "${env:SECRET}"',
         'on_overrun: "${env:SECRET}" is not one of them ("warn", "restart" or "stop")'),
    ],
)  # fmt: skip
def test_a_substitution_that_cannot_be_made_is_told_without_values(
    check: Check, tmp_path: Path, line: str, message: str
) -> None:
    """One problem each, and what a variable holds is never in it."""
    problems = told(
        lambda: check(MODEL + line, env={"SECRET": "hunter2", "CREDENTIALS_DIRECTORY": str(tmp_path)}), tmp_path
    )
    assert problems == [f"vllmd.toml:3: models.ocr.{message}"]


# -- paths ------------------------------------------------------------------------------------------------------------


def test_paths_default_to_the_system_for_root_and_to_xdg_for_others(tmp_path: Path) -> None:
    """Root has /run, /var/lib, /var/log, /var/cache; others their home and runtime directory, or a private one."""
    file = tmp_path / "x.toml"
    file.write_text("")
    root = load(file, root=True, env={}).daemon
    assert (root.socket, root.state_dir, root.runtime_dir, root.log_dir, root.cache_dir) == (
        Path("/run/vllmd.sock"), Path("/var/lib/vllmd"), Path("/run/vllmd"), Path("/var/log/vllmd"),
        Path("/var/cache/vllmd"),
    )  # fmt: skip
    own = load(file, root=False, env={"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/7"}).daemon
    assert (own.socket, own.state_dir, own.runtime_dir, own.log_dir, own.cache_dir) == (
        Path("/run/user/7/vllmd/vllmd.sock"), Path("/home/ada/.local/state/vllmd"), Path("/run/user/7/vllmd"),
        Path("/home/ada/.local/state/vllmd/log"), Path("/home/ada/.cache/vllmd"),
    )  # fmt: skip
    bare = load(file, root=False, env={"HOME": "/home/ada", "TMPDIR": "/var/tmp"}).daemon
    assert bare.runtime_dir.parent == Path("/var/tmp") and bare.runtime_dir.name.startswith("vllmd-")


def test_what_systemd_prepared_wins_over_defaults_and_the_file_over_both(check: Check, tmp_path: Path) -> None:
    """STATE_DIRECTORY and its sisters are used where the file says nothing; a list counts by its first."""
    daemon = check(
        '[daemon]\nlog_dir = "log"',
        env={"STATE_DIRECTORY": "/s/a:/s/b", "LOGS_DIRECTORY": "/l", "RUNTIME_DIRECTORY": "/r", "CACHE_DIRECTORY": "c"},
    ).daemon
    assert (daemon.state_dir, daemon.log_dir, daemon.runtime_dir) == (Path("/s/a"), tmp_path / "log", Path("/r"))
    assert daemon.socket == Path("/r/vllmd.sock")
    assert daemon.cache_dir == Path("/home/ada/.cache/vllmd")


def test_the_file_is_found_by_variable_then_by_user(tmp_path: Path) -> None:
    """$VLLMD_CONFIG; root /etc; others their own if there is one, else /etc."""
    env = {"HOME": str(tmp_path)}
    system = Path("/etc/vllmd/vllmd.toml")
    assert find_config({**env, "VLLMD_CONFIG": "/x.toml"}, root=True) == Path("/x.toml")
    assert find_config(env, root=True) == system
    assert find_config(env, root=False) == system
    own = tmp_path / ".config/vllmd/vllmd.toml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config(env, root=False) == own


def test_a_model_must_not_take_the_control_socket(check: Check, tmp_path: Path) -> None:
    """A model's socket is runtime_dir/NAME.sock, and the daemon's own is there too where nobody says otherwise."""
    text = '[models.vllmd]\nmodel = "owner/name"\n'
    (line,) = told(lambda: check(text), tmp_path)
    assert "vllmd's own control socket /run/user/7/vllmd/vllmd.sock" in line
    assert check(text + "port = 8000\n").models["vllmd"].port == 8000
