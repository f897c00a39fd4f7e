"""What the terminal can show: width, height, signs, colour. Colour only tints: the text is the same without it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

BOLD, DIM, GREEN, CYAN, AMBER, RED = "1", "2", "32", "36", "33", "1;31"

#: state -> (sign, sign where there is only ASCII, SGR). systemd's signs where it has one.
SIGNS = {
    "ready": ("●", "*", GREEN),
    "starting": ("↻", ">", CYAN),
    "waiting": ("…", "~", CYAN),
    "draining": ("▾", "v", CYAN),
    "stopping": ("▾", "v", CYAN),
    "dozing": ("z", "z", CYAN),
    "asleep": ("z", "z", DIM),
    "waking": ("↻", ">", CYAN),
    "backoff": ("!", "!", AMBER),
    "failed": ("×", "x", RED),
    "stopped": ("○", "-", DIM),
}


class Look:
    """How to draw. `columns` 0 = without bound (a pipe); `lines` 0 = no terminal, so nothing can be redrawn."""

    __slots__ = ("colour", "columns", "lines", "unicode")

    def __init__(self, columns: int = 100, lines: int = 0, unicode: bool = True, colour: bool = False) -> None:
        self.columns = columns
        self.lines = lines
        self.unicode = unicode
        self.colour = colour

    def paint(self, sgr: str, text: str) -> str:
        """`text` in a colour, its outer spaces left alone."""
        bare = text.strip(" ")
        if not self.colour or not bare or not sgr:
            return text
        return text.replace(bare, f"\x1b[{sgr}m{bare}\x1b[0m", 1)

    def sign(self, state: str) -> tuple[str, str]:
        """(sign, SGR) of a state; a state that this vllmctl does not know yet gets "?"."""
        full, plain, sgr = SIGNS.get(state, ("?", "?", ""))
        return (full if self.unicode else plain), sgr

    @property
    def dots(self) -> str:
        """What stands for left-out text."""
        return "…" if self.unicode else "~"

    @property
    def arrow(self) -> str:
        """From one state to the next."""
        return "→" if self.unicode else "->"


def has_unicode(stream: TextIO) -> bool:
    """Whether what is written to `stream` may be more than ASCII: by its encoding, and by the locale that the user set.

    Python alone does not tell: for LC_ALL=C it turns to UTF-8, and without LC_ALL it sets LC_CTYPE=C.UTF-8 itself.
    Where no locale is set at all nobody has asked for ASCII."""
    import os
    import sys

    if (stream.encoding or "ascii").lower().replace("-", "") not in ("utf8", "utf8sig"):
        return False
    env = os.environ
    kind = env.get("LC_CTYPE")
    if sys.flags.utf8_mode and kind == "C.UTF-8":  # perhaps Python's own: what we were started with is here
        try:
            with open("/proc/self/environ", "rb") as file:  # noqa: PTH123
                began = dict(each.partition(b"=")[::2] for each in file.read().split(b"\0"))
            kind = began.get(b"LC_CTYPE", b"").decode("ascii", "replace")
        except OSError:
            kind = None
    wish = env.get("LC_ALL") or kind or env.get("LANG")
    return not wish or "utf8" in wish.lower().replace("-", "")


def spell(text: str, stream: TextIO) -> str:
    """`text` in the characters that `stream` takes."""
    if not text.isascii() and not has_unicode(stream):
        text = ascii_of(text)
    coding = stream.encoding or "ascii"
    return text.encode(coding, "replace").decode(coding)


def ascii_of(text: str) -> str:
    """`text` with its signs as their ASCII twins, and "?" for every other letter."""
    for sign, plain in (
        ("…", "~"),
        ("→", "->"),
        ("×", "x"),
        ("·", "-"),
        ("●", "*"),
        ("○", "-"),
        ("↻", ">"),
        ("▾", "v"),
    ):
        text = text.replace(sign, plain)
    return text.encode("ascii", "replace").decode()


def look_at(stream: TextIO, colour: str = "auto") -> Look:
    """How to draw on `stream`: from its terminal, the locale, TERM, NO_COLOR, COLUMNS. `colour` = auto|always|never."""
    import os

    term = os.environ.get("TERM", "")
    terminal = stream.isatty()
    tinted = colour == "always" or (colour == "auto" and terminal and term != "dumb" and not os.environ.get("NO_COLOR"))
    # the Linux console has 512 glyphs at most, and ↻ is in few of its fonts
    full = term != "linux" and has_unicode(stream)
    columns = lines = 0
    if terminal:
        try:
            columns, lines = os.get_terminal_size(stream.fileno())
        except (OSError, ValueError):
            columns = 80
        columns = columns or 80
    wish = os.environ.get("COLUMNS", "")
    if wish.isascii() and wish.isdigit():
        columns = int(wish)
    return Look(max(columns, 20) if columns else 0, lines, full, tinted)
