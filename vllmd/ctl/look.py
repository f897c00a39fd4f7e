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
    "asleep": ("z", "z", DIM),
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


def look_at(stream: TextIO, colour: str = "auto") -> Look:
    """How to draw on `stream`: from its terminal, the locale, TERM, NO_COLOR, COLUMNS. `colour` = auto|always|never."""
    import os

    term = os.environ.get("TERM", "")
    terminal = stream.isatty()
    tinted = colour == "always" or (colour == "auto" and terminal and term != "dumb" and not os.environ.get("NO_COLOR"))
    # the Linux console has 512 glyphs at most, and ↻ is in few of its fonts
    full = term != "linux" and (stream.encoding or "ascii").lower().replace("-", "") in ("utf8", "utf8sig")
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
