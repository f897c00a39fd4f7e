"""The table: as drawn, at every width, with and without colour, whatever a daemon puts into it."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ctl_status import GIB, crowd, device, example, model, status, why
from vllmd.ctl.bar import device_lines
from vllmd.ctl.look import Look
from vllmd.ctl.table import rows, status_text
from vllmd.ctl.words import clip, exact, shorten, width, wrap

GOLDEN = Path(__file__).parent / "data" / "golden"
SGR = re.compile(r"\x1b\[[0-9;]*m")
ONE = status(
    [model("chat", "ready", reserved=4.0, used=3.9, since_s=90.0, endpoint="unix:/run/c.sock")], [device(free=7.4)]
)
PICTURES = {
    "example": example(),
    "one": ONE,
    "none": status([], [device()]),
    "crowd": crowd(),
    "no-device": crowd(12, 0),
}
LOOKS = {
    "120": Look(120), "100": Look(100), "80": Look(80), "60": Look(60), "80-low": Look(80, 30), "pipe": Look(0),
    "100-colour": Look(100, colour=True), "80-ascii": Look(80, unicode=False),
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("picture", PICTURES)
def test_the_text_is_the_golden_one(picture: str, look: str) -> None:
    """Every change of the table is a change of a file that somebody has looked at (VLLMD_GOLDEN=write makes them)."""
    text = "\n".join(status_text(PICTURES[picture], LOOKS[look])) + "\n"
    path = GOLDEN / f"{picture}-{look}.txt"
    if os.environ.get("VLLMD_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("picture", PICTURES)
def test_colour_only_tints(picture: str) -> None:
    """The text without its colours is the text that has none."""
    plain = status_text(PICTURES[picture], Look(100))
    assert [SGR.sub("", line) for line in status_text(PICTURES[picture], Look(100, colour=True))] == plain


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("picture", PICTURES)
def test_nothing_is_wider_than_the_terminal_but_what_gets_pasted(picture: str, columns: int) -> None:
    """Lines end at the edge; remedies are never broken nor cut."""
    lines = status_text(PICTURES[picture], Look(columns))
    assert [line for line in lines if width(line) > columns and not line.lstrip().startswith(("try:", "or:"))] == []


def test_ascii_means_ascii() -> None:
    """Where the locale has no UTF-8 no other character comes out, whatever is in the status."""
    picture = status([model("modèle…", "failed", why=why("größer", "für 日本 × …", "a → b"))], [device(name="é")])
    assert all(line.isascii() for line in status_text(picture, Look(80, unicode=False)))


def test_stopped_models_fold_when_the_terminal_is_too_low() -> None:
    """One line stands for them, naming as many as fit; --all shows them all."""
    low = status_text(crowd(), Look(80, 30))
    assert len(low) < 40
    folded = [line for line in low if "stopped:" in line]
    assert len(folded) == 1 and folded[0].startswith("○ 82 stopped: model-001, ") and folded[0].endswith("… (--all)")
    assert len([line for line in status_text(crowd(), Look(80, 30), everything=True) if "model-" in line]) >= 100


def test_long_names_are_cut_in_their_middle_and_sizes_never() -> None:
    """The beginning and the end of a name stay, and every figure."""
    models = [model("a-very-long-name-" + "x" * 60 + "-8b", "ready", reserved=119.8, used=100.25, endpoint="unix:/x")]
    for columns in (60, 80, 100, 120):
        line = rows(models, Look(columns))[1]
        assert line.startswith("● a-v") and "…" in line and "8b  ready" in line and "100.2/119.8" in line
    assert models[0]["name"] in rows(models, Look(0))[1], "a pipe gets the whole name"


def test_wide_characters_are_counted() -> None:
    """Columns stay below each other with names that take two columns a character."""
    lines = rows([model("文字認識", "ready"), model("chat", "ready")], Look(80))
    assert len({width(line[: line.index("ready")]) for line in lines[1:]}) == 1


HOSTILE = [
    "\x1b[31mred\x1b]0;title\x07",
    "two\nlines\r\n",
    "\u202eoverride",
    "nul\x00\x9bcsi",
    "\ud800half",
    "z\u200bw\u2066i",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_come_out_harmless(text: str) -> None:
    """No control, direction or half character of a daemon's string reaches the terminal, nor a second line."""
    said = why(text, text, text)
    models = [model(text, "failed", why=said), model("b", text), model("c", "starting", phase=text, endpoint=text)]
    picture = status(models, [device(name=text, id=text, kind=text, label=text)])
    picture["daemon"] |= {"host": text, "version": text, "config": text, "trouble": text}
    for look in (Look(80), Look(0), Look(100, unicode=False)):
        for line in status_text(picture, look):
            assert line.isprintable()
            line.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*sorted(model("x")), "class", "text", "short", "remedies"]
MODELS = st.lists(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON, max_size=4)
DEVICES = st.lists(st.dictionaries(st.sampled_from(sorted(device())), JSON) | JSON, max_size=3)


@given(models=MODELS, devices=DEVICES, daemon=JSON, columns=st.integers(20, 200), lines=st.integers(0, 50))
def test_no_status_is_so_odd_that_it_raises(models: Any, devices: Any, daemon: Any, columns: int, lines: int) -> None:
    """Missing keys and values of other types are shown as missing."""
    picture = {"daemon": daemon, "devices": devices, "models": models}
    for line in status_text(picture, Look(columns, lines)):
        assert line.isprintable()


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
def test_bars_fill_the_line_and_their_ends_are_aligned(columns: int) -> None:
    """Every bar is as wide as the terminal: its parts add up to the device."""
    assert {width(line) for line in device_lines(crowd(100, 8), Look(columns))} == {columns}


def test_a_part_is_never_drawn_wider_than_its_share_but_for_the_largest() -> None:
    """Cells less separators are the share of the device; who gets the rest is the largest."""
    (line,) = device_lines(example(), Look(100))
    parts = line[line.index("[") + 1 : line.index("]")].split("|")
    inside = sum(map(len, parts)) + len(parts) - 1
    sizes = [6.2, 3.4, 0.6, 0.4, 0.5, 0.3, 0.6]
    assert len(parts) == len(sizes)
    for part, size in list(zip(parts, sizes, strict=True))[1:]:
        assert len(part) == max(1, int(size / 12 * inside) - 1)


def test_small_models_join_in_the_bar() -> None:
    """More models than a bar has room for become one part that says how many they are."""
    models = [model("big", "ready", reserved=8.0, used=8.0)]
    models += [model(f"s{at}", "ready", reserved=0.05, used=0.05) for at in range(40)]
    (line,) = device_lines(status(models, [device(free=1.4)]), Look(100))
    assert "+40 2.0" in line and width(line) == 100


def test_a_silent_device_says_so_and_a_short_pause_does_not() -> None:
    """NVML gone is a sentence, not a number that was true once."""
    (line,) = device_lines(status([], [device(silent_s=95.0)]), Look(80))
    assert line.endswith("no answer for 95 s") and "free" not in line
    (line,) = device_lines(status([], [device(silent_s=3.0)]), Look(80))
    assert line.endswith("GiB free")


def test_an_overrun_is_drawn_with_what_it_takes() -> None:
    """A model that uses more than it reserved fills what it uses."""
    over = model("hog", "ready", reserved=2.0, used=8.0)
    (line,) = device_lines(status([over], [device(free=3.4)]), Look(100))
    assert "hog 8.0" in line
    assert over["reserved"] == 2 * GIB


def test_a_warning_about_a_ready_model_stands_below() -> None:
    """Ready with a sentence is a warning; waiting with one is not a problem."""
    models = [
        model("a", "ready", why=why("0.4 GiB over", "uses 0.4 GiB more than reserved", "raise models.a.vram")),
        model("b", "waiting", why=why("for memory", "waiting for memory")),
    ]
    text = "\n".join(status_text(status(models, [device()]), Look(80)))
    assert "! a: uses 0.4 GiB more than reserved\n  try: raise models.a.vram" in text
    assert "b: waiting" not in text


@pytest.mark.parametrize("columns", range(1, 12))
@pytest.mark.parametrize(
    "text", ["文字認識文字", "e\u0301e\u0301e\u0301e\u0301e\u0301e\u0301", "a文b字c認", "abcdefghijklm"]
)
def test_a_cut_uses_the_room_there_is(text: str, columns: int) -> None:
    """Never wider, and narrower by less than one wide character."""
    for cut in (clip(text, columns), shorten(text, columns)):
        assert min(width(text), columns) - 2 < width(cut) + (cut != text and columns < 3) and width(cut) <= columns


def test_a_wrapped_text_keeps_its_indent() -> None:
    """The first line stands where the text begins."""
    assert wrap("    one two three", 12, "    ") == ["    one two", "    three"]
    assert wrap("! a: b c", 6) == ["! a: b", "  c"]
    assert wrap("  " + "x" * 20 + " y", 10) == ["  " + "x" * 20, "  y"]


def test_a_time_that_was_set_is_spelt_exactly() -> None:
    """In the largest unit that divides it."""
    said = [exact(each) for each in (0, 0.25, 1, 90, 120, 150, 5400, 7200, 86400, 129600)]
    assert said == ["0 s", "250 ms", "1 s", "90 s", "2 min", "150 s", "90 min", "2 h", "1 d", "36 h"]
