"""Any text and any document: load answers with Settings or ConfigError, and the scanner agrees with tomli."""

import json
from pathlib import Path
from typing import Any

import tomli
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllmd.config.load import ConfigError, load
from vllmd.config.options import SECTIONS, TOP
from vllmd.config.parse import parse
from vllmd.config.positions import positions

FILE = Path("/nowhere/vllmd.toml")

keys = st.one_of(
    st.sampled_from(sorted({key for options in SECTIONS.values() for key in options})),
    st.sampled_from(["ocr", "a.b", "*", "0", "env", "B", "", "é", 'quo"te', "line\nbreak", "#"]),
    st.text(max_size=4),
)
scalars = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["9GiB", "auto", "1s", "50%", "${env:A}", "${credential:b}", "${", "a/b", "./x", "~", "off", "\0"]),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)
tables = st.dictionaries(keys, values, max_size=6)
documents = st.fixed_dictionaries(
    {},
    optional={
        "daemon": st.one_of(tables, values),
        "http": st.one_of(tables, values),
        "defaults": tables,
        "devices": st.one_of(st.dictionaries(keys, tables, max_size=2), values),
        "models": st.one_of(st.dictionaries(keys, tables, max_size=3), values),
        "other": values,
    },
)
scraps = st.lists(
    st.one_of(
        st.sampled_from(
            [*TOP, "[", "]", "[[", "]]", "{", "}", "=", ",", ".", "\n", "\r\n", '"', "'", '"""', "'''", "#", "\\", " ", "\0",
             "[models.a]\n", "model", "=", '"a/b"', "vram", "1", "true", "1979-05-27", "nan", "${env:A}", "\\u0000", "\ufeff"]
        ),
        st.text(max_size=3),
    ),
    max_size=40,
).map("".join)  # fmt: skip


def spell(value: Any) -> str:
    """A value as TOML."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value).replace("\x7f", "\\u007f").encode("utf-8", "replace").decode()
        case list():
            return "[" + ", ".join(map(spell, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{spell(key)} = {spell(inner)}" for key, inner in value.items()) + "}"
    return str(value)


def check(content: bytes) -> None:
    """Load, and look at the problems if there are any."""
    try:
        load(FILE, content=content, root=False, env={"A": "secret-value", "CREDENTIALS_DIRECTORY": "/nowhere"})
    except ConfigError as exc:
        assert exc.problems
        for problem in exc.problems:
            assert 0 <= problem.line <= content.count(b"\n") + 1
            assert "\0" not in problem.key
            assert "secret-value" not in str(problem)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_config_error(content: bytes) -> None:
    """Whatever a file holds, the answer is a configuration or a list of problems."""
    check(content)


@settings(max_examples=300)
@given(scraps)
@example('[models.a]\nmodel="\\u0000"')
@example('"' + "\\")
@example("a = '''\\")
@example(".".join("a" * 500) + " = 1")
def test_no_text_raises_anything_but_config_error(text: str) -> None:
    """Scraps of TOML in any order."""
    check(text.encode("utf-8", "replace"))


@settings(max_examples=300)
@given(documents)
def test_no_document_raises_anything_but_config_error(document: dict[str, Any]) -> None:
    """Well-formed TOML with any value at any key."""
    text = "\n".join(f"{key} = {spell(value)}" for key, value in document.items())
    check(text.encode())


@settings(max_examples=200)
@given(st.one_of(scraps, documents.map(lambda document: spell(document)[1:-1].replace(", ", "\n"))))
def test_nothing_is_lost_without_a_problem(text: str) -> None:
    """A layer without problems says exactly what tomli reads; one with problems stands for a file that it refuses."""
    content = text.encode("utf-8", "replace")
    layer = parse(content, "f", Path("/"))
    try:
        data = tomli.loads(content.decode().removeprefix("\ufeff").replace("\r\n", "\n"))
    except (tomli.TOMLDecodeError, RecursionError):
        assert layer.problems
    else:
        assert not layer.problems and repr(layer.data) == repr(data)


# -- positions --------------------------------------------------------------------------------------------------------

Spot = tuple[tuple[str | int, ...], int]
names = st.one_of(
    st.sampled_from(["a", "b-c", "1", "a b", 'q"', "d.e", "é", "tab\t"]), st.text("xyz", min_size=1, max_size=2)
)
words = st.sampled_from(
    ["1", "true", '"s"', "'#'", '"""\n# not a comment\n[x]\n"""', '"""q""""', "'''\n'\n''''", "1979-05-27",
     '"\\""']
)  # fmt: skip


@st.composite
def written(draw: st.DrawFn) -> tuple[str, list[Spot]]:
    """A TOML text and where its keys stand, written line by line."""
    lines: list[str] = []
    spots: list[Spot] = []

    def key(name: str) -> str:
        bare = name.isascii() and name.replace("-", "").isalnum()
        return name if bare and draw(st.booleans()) else json.dumps(name)

    def put(text: str) -> int:
        lines.extend(text.split("\n"))
        return len(lines) - text.count("\n")

    def pairs(path: tuple[str | int, ...]) -> None:
        for name in draw(st.lists(names, max_size=3, unique=True)):
            put(draw(st.sampled_from(["", "# [models.x] a = 1", "   "])))
            match draw(st.integers(0, 3)):
                case 0:
                    spots.append(((*path, name), put(f"  {key(name)} = {draw(words)} # '\"")))
                case 1:
                    start = put(f"{key(name)} = [ # x")
                    spots.append(((*path, name), start))
                    for index, word in enumerate(draw(st.lists(words, max_size=3))):
                        spots.append(((*path, name, index), put(f"   {word},")))
                    put("]")
                case 2:
                    line = put(f"{key(name)} . {key('in')} = {{ k = [{{ z = 1 }}], 'm' = {draw(words)} }}")
                    inner = (*path, name, "in")
                    spots.extend((spot, line) for spot in (
                        inner[:-1], inner, (*inner, "k"), (*inner, "k", 0), (*inner, "k", 0, "z"), (*inner, "m")
                    ))  # fmt: skip
                case _:
                    pass

    pairs(())
    for number, name in enumerate(draw(st.lists(names, max_size=3))):
        table = f"t{number}"
        if draw(st.booleans()):
            spots.append(((table, name), put(f"[ {table} . {key(name)} ] # ]")))
            pairs((table, name))
        else:
            for index in range(draw(st.integers(1, 3))):
                spots.append(((table, index), put(f"[[{table}]]")))
                pairs((table, index))
                spots.append(((table, index, "sub table"), put(f"[{table}.'sub table']")))
                pairs((table, index, "sub table"))
    return "\n".join(lines), spots


def paths(value: Any, at: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Every path in a parsed document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {at} | {path for key, v in inner for path in paths(v, (*at, key))}


@settings(max_examples=200)
@given(written())
def test_every_key_is_found_on_its_line(document: tuple[str, list[Spot]]) -> None:
    """Tables, dotted and quoted keys, inline tables, multi-line strings and arrays, [[x]], comments: as tomli reads them."""
    text, spots = document
    found = positions(text)
    assert paths(tomli.loads(text)) - {()} == set(found)
    for path, line in spots:
        assert (path, found[path]) == (path, line)


@settings(max_examples=300)
@given(scraps)
def test_the_scanner_ends_on_any_text(text: str) -> None:
    """It neither raises nor hangs, and names lines that exist."""
    assert all(1 <= line <= text.count("\n") + 1 for line in positions(text).values())
