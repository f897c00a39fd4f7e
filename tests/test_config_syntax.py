"""Syntax errors in the words of who wrote them: what people write in place of TOML, and the way out of each."""

from pathlib import Path

import pytest

from vllmd.config.load import ConfigError, load

MODEL = '[models.a]\nmodel = "o/m"\n'  # a key's mistake then stands on line 3
RULE = "lower-case letters, digits, ., _ and -, at most 63, the first a letter or digit"


def told(content: bytes | str) -> list[str]:
    """The problems of a file, without its name."""
    raw = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(ConfigError) as caught:
        load(Path("/x.toml"), content=raw, env={}, root=False)
    return [str(problem).removeprefix("/x.toml:") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("autostart = True", "autostart: True is not a value (try true)"),
        ("autostart = TRUE # x", "autostart: TRUE is not a value (try true)"),
        ("autostart = no", "autostart: no is not a value (try false)"),
        ("args = { enforce-eager = True }", "args: True is not a value (try true)"),
        ("port = 08000", "port: 08000 has a zero in front (try 8000)"),
        ("args = { seed = 01 }", "args: 01 has a zero in front (try 1)"),
        ("port = 8000,", "port: a comma follows the value (delete it)"),
        ('executable = "vllm", # x', "executable: a comma follows the value (delete it)"),
        ("max_model_len = 8,192", "max_model_len: 8,192 is not a number (try 8192)"),
        ("args = { max-num-seqs = 1,024 }", "args: 1,024 is not a number (try 1024)"),
        ("port = 8 000", "port: 8 000 is not a number (try 8000)"),
        ("vram = 9GiB", 'vram: 9GiB needs quotes (try "9GiB")'),
        ("vram = 9 GiB", 'vram: 9 GiB needs quotes and no space (try "9GiB")'),
        ("vram = 50%", 'vram: 50% needs quotes (try "50%")'),
        ("executable = bin/vllm", 'executable: is not a value (strings need quotes: "bin/vllm")'),
        ("executable = “vllm”", 'executable: these are not the quotes of TOML (try "vllm")'),
        ("executable = “\x1b[31m”", "executable: these are not the quotes of TOML"),
        ("port =", "port: has no value"),
        ('executable: "vllm"', '"executable:": is not key = value (write = in place of :)'),
        ("executable = 'vllm", "executable: the string is not closed (end it with the quotes it began with)"),
        ('executable = "C:\\models"',
         "executable: a backslash between double quotes begins an escape (write it twice, or use single quotes)"),
        ("port = 8000 8001 8002", "port: something follows the value (strings need quotes, comments a #)"),
        (f"port = 0{'1' * 5000}", "port: something follows the value (strings need quotes, comments a #)"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_is_told_with_what_was_meant(line: str, message: str) -> None:
    """Other languages' words and numbers; one problem each."""
    assert told(MODEL + line) == [f"3: models.a.{message}"]


def test_inside_a_table_of_many_lines_the_line_is_the_wrong_values() -> None:
    """Each of them, and what follows the table is checked."""
    assert told(MODEL + "args = {\n  enforce-eager = True,\n  seed = 01,\n}\nvrma = 1") == [
        "4: models.a.args: True is not a value (try true)",
        "5: models.a.args: 01 has a zero in front (try 1)",
        "7: models.a.vrma: unknown key (did you mean vram?)",
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[models.Foo Bar]", 'models."Foo Bar": a name with a space needs quotes, and is no model\'s name '
                             "(try [models.foo-bar])"),
        ("[models.qwen 2.5]", 'models."qwen 2.5": a name with a space needs quotes, and is no model\'s name '
                              '(try [models."qwen-2.5"])'),
        ("[models.ü]", f'models."ü": "ü" is not a model\'s name ({RULE})'),
        ("[]", "the header has no name ([section] or [section.name])"),
        ("[models.]", "models: the header has no name ([models.NAME])"),
        ("[models..a]", "models: a name is missing between dots ([models.NAME])"),
        ("[devices.*]", 'devices."*": "*" needs quotes ([devices."*"])'),
        ("[devices.GPU 0]", 'devices."GPU 0": "GPU 0" needs quotes ([devices."GPU 0"])'),
        ("[models.ü # x", 'models."ü": the header is not closed ([section] or [section.name])'),
        ("[daemon] # x\n[http] listen = []", "http: something follows the header (keys go on lines of their own)"),
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_told_by_its_rule(header: str, message: str) -> None:
    """Not in the words of the parser."""
    assert told(header) == [f"{header.count(chr(10)) + 1}: {message}"]


def test_keys_below_a_wrong_header_are_still_checked() -> None:
    """They belong to the table that was meant."""
    assert told('[models.Foo Bar]\nmodel = "o/m"\nvrma = 1')[1:] == [
        '3: models."Foo Bar".vrma: unknown key (did you mean vram?)'
    ]


def test_a_table_of_a_model_that_stands_there_twice_makes_up_no_mistakes() -> None:
    """Its keys are flags, not keys of a model."""
    assert told(MODEL + "args = { seed = 1 }\n[models.a.args]\nmax-num-seqs = 2") == [
        "4: models.a.args: this table stands here twice (join the two)"
    ]


@pytest.mark.parametrize(
    "line",
    [b'category = ["caf\xe9"]', b"port = 80\xe9", b'executable = "/opt/caf\xe9"', b"# caf\xe9", b'caf\xe9 = "x"'],
)
def test_a_strange_byte_is_one_problem(line: bytes) -> None:
    """Whatever it does to the line it stands on; the others are checked."""
    assert told(MODEL.encode() + line + b"\nvrma = 1") == [
        "3: is not UTF-8 (save the file as UTF-8)",
        "4: models.a.vrma: unknown key (did you mean vram?)",
    ]


def test_utf16_is_one_problem() -> None:
    """As another system's editor saves it."""
    assert told((MODEL + "vrma = 1").encode("utf-16")) == ["1: is not UTF-8 (save the file as UTF-8)"]
