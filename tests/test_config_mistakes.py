"""Many mistakes at once: all are reported with their lines, none is made up, whatever broke the syntax before."""

from pathlib import Path

import pytest

from vllmd.config.load import ConfigError, load

MODEL = """
[models.m{n:02}]  # model {n}
model = "owner/model-{n}"
category = ["llm", "chat"]
vram = "{n}GiB"
max_model_len = 4096
port = {port}
drain = "30s"
restart = {{ backoff = "2s", window = "20m" }}
args = {{ seed = {n}, limit-mm-per-prompt = {{ image = 1 }}, lora-modules = [
    "a", # one
    "b",
] }}
[models.m{n:02}.env]
OMP_NUM_THREADS = "2"
"""
HEAD = """\
[daemon]
log_level = "debug"
[http]
listen = [
    "127.0.0.1:8400",
    "[::1]:8400",
]
[devices."*"]
limit = "40GiB"
[defaults]
executable = "/opt/vllm/bin/vllm"
"""

#: What is found in the good file -> what is put in its place, and the key that the problem must name.
MISTAKES = {
    'log_level = "debug"': ('log_level = "loud"', "daemon.log_level"),
    '"[::1]:8400",': ('"[::2]:8400",', "http.listen[1]"),
    'limit = "40GiB"': ("limit = 40", 'devices."*".limit'),
    'model = "owner/model-2"': ('modle = "owner/model-2"', "models.m02.modle"),
    'vram = "3GiB"': ('vram = "3 Gb"', "models.m03.vram"),
    "port = 8004": ("port = 8003", "models.m04.port"),
    "[models.m05]  # model 5": ("[models.m05  # model 5", "models.m05"),
    'vram = "5GiB"': ('vram = "0GiB"', "models.m05.vram"),
    'model = "owner/model-6"': ('model = "owner/model-6', "models.m06.model"),
    'args = { seed = 7, limit-mm-per-prompt = { image = 1 }, lora-modules = [': (
        "args = { seed = 7, limit-mm-per-prompt = { image = 1 }, port = [", "models.m07.args.port"),
    'args = { seed = 8, limit-mm-per-prompt = { image = 1 }, lora-modules = [': (
        "args = { seed = 8, gpu_memory_utilization = 1, lora-modules = [", "models.m08.args.gpu_memory_utilization"),
    "port = 8009": ("port = 9", "models.m09.port"),
    'vram = "10GiB"': ('vram = "10GiB" "x"', "models.m10.vram"),
    "[models.m11]  # model 11": ("[models.M11]  # model 11", "models.M11"),
    'vram = "12GiB"': ("vram = true", "models.m12.vram"),
    "port = 8013": ("port 8013", "models.m13.port"),
    'vram = "14GiB"': ("vram = 14GiB", "models.m14.vram"),
    "[models.m15.env]": ("[models.m15.evn]", "models.m15.evn"),
    'vram = "16GiB"': ('vram = "16GiB"\ngpus = "all"', "models.m16.gpus"),
    'vram = "17GiB"': ('vram = "17GiB"\ntemperature = 1', "models.m17.temperature"),
    'model = "owner/model-20"': ("ttl = 15", "models.m20.ttl"),
    "port = 8018": ("drain = \"1s\"", "models.m18.drain"),
    "[models.m19]  # model 19": ("[models.m01]  # model 19", "models.m01"),
}  # fmt: skip


def test_each_of_many_mistakes_in_300_lines_is_reported_and_nothing_else(tmp_path: Path) -> None:
    """24 mistakes, 7 of them of syntax: as many problems, each on its line and with its key."""
    text = HEAD + "".join(MODEL.format(n=n, port=8000 + n) for n in range(1, 21))
    file = tmp_path / "vllmd.toml"
    file.write_text(text)
    assert len(load(file, env={}).models) == 20 and text.count("\n") > 290
    lines, expected = [""], set()
    left = dict(MISTAKES)
    for line in text.splitlines():
        wrong, key = left.pop(line.strip(), (line, ""))
        lines += wrong.split("\n")
        if key:
            # The second of two equal keys is the one too many, and that stands on the next line.
            expected.add((len(lines) - 1 + (key == "models.m18.drain"), key))
    assert not left
    # m20 lost its model with the line that became a wrong ttl: a mistake of its own.
    expected.add((lines.index("[models.m20]  # model 20"), "models.m20"))
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    assert {(problem.line, problem.key) for problem in caught.value.problems} == expected
    numbers = [problem.line for problem in caught.value.problems]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[http]\nlisten = ["127.0.0.1:1"\n[daemon]\nlog_levle = "info"', [(2, "http.listen"), (4, "daemon.log_levle")]),
        ('[http]\nlisten = [\n  "127.0.0.1:1",\n[daemon]\nlog_keep = 0', [(2, "http.listen"), (5, "daemon.log_keep")]),
        ('[http]\nlisten = [\n  "127.0.0.1:1"\n  "127.0.0.1:2",\n]\nx = 1', [(4, "http.listen"), (6, "http.x")]),
        ('[daemon]\nsocket = """/x\nlog_keep = 0\n[http]\nx = 1',
         [(2, "daemon.socket"), (3, "daemon.log_keep"), (5, "http.x")]),
        ('[daemon]\nlog_keep = 1\nlog_keep = 2\nx = 1', [(3, "daemon.log_keep"), (4, "daemon.x")]),
        ('[models.a]\nmodel = "a/b"\n[models.a]\nvrma = 1', [(3, "models.a"), (4, "models.a.vrma")]),
        ('[models.a\nmodel = "a/b"\nx = 1\n[models.b]\nmodel = a/b\ny = 1',
         [(1, "models.a"), (3, "models.a.x"), (5, "models.b.model"), (6, "models.b.y")]),
        ('[daemon]\nlog_keep = 00\nlog_size = "1"\n', [(2, "daemon.log_keep"), (3, "daemon.log_size")]),
        ('= 1\n[daemon]\nx = 1', [(1, ""), (3, "daemon.x")]),
        ('[daemon]\nsocket = "C:\\x"\nx = 1', [(2, "daemon.socket"), (3, "daemon.x")]),
        ("[models.a]\nargs = { a = 1\nmodel = 'a/b'\nx = 1", [(2, "models.a.args"), (4, "models.a.x")]),
        ("[daemon]\nlog_keep = " + "9" * 5000 + "\nx = 1", [(2, "daemon.log_keep"), (3, "daemon.x")]),
        ("[models.a]\nmodel = 'a/b'\nargs = { a = " + "[" * 300 + "]" * 300 + " }", [(3, "models.a.args")]),
        ("x = " + "[" * 5000, [(1, "x")]),
    ],
)  # fmt: skip
def test_what_follows_a_syntax_error_is_still_checked(
    tmp_path: Path, text: str, expected: list[tuple[int, str]]
) -> None:
    """The statement that is broken is named, the rest read as if it were right."""
    file = tmp_path / "vllmd.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    assert [(problem.line, problem.key.partition(".args.")[0] if "[[" in text else problem.key)
            for problem in caught.value.problems][: len(expected)] == expected  # fmt: skip
    assert "\0" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_located_and_the_rest_checked(tmp_path: Path) -> None:
    """One problem for the encoding, then the others."""
    file = tmp_path / "vllmd.toml"
    file.write_bytes(b"# caf\xe9\r\n[daemon]\r\nx = 1\r\n")
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    assert [(p.line, p.key) for p in caught.value.problems] == [(1, ""), (3, "daemon.x")]


def test_a_file_that_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    """Half a megabyte is no configuration."""
    file = tmp_path / "vllmd.toml"
    file.write_bytes(b"#" * (1 << 19) + b"\n")
    with pytest.raises(ConfigError, match="is longer than 512 KiB"):
        load(file, env={})
