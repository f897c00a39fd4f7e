"""What a syntax error means to the writer of the file: from tomli's words and the text around them to a sentence and a
way out. tomli says what it expected; what people wrote instead is nearly always one of a few things.
"""

import re
import string
from typing import Final, NamedTuple

from vllmd.config.names import MODEL_NAME, NAME_RULE, likely_name
from vllmd.config.problems import Key, quote, spell

_WORDS: Final = {  # tomli's words -> what they mean to the writer of the file, and what to do
    "Illegal character '\\n'": ("the string is not closed", "end it with the quotes it began with"),
    "Found invalid character '\\n'": ("the string is not closed", "end it with the quotes it began with"),
    "Unterminated string": ("the string is not closed", "end it with the quotes it began with"),
    "Expected \"'": ("the string is not closed", "end it with the quotes it began with"),
    "Illegal character": ("holds a control character", "delete it"),
    "Found invalid character": ("holds a control character", "delete it"),
    "Unescaped '\\'": ("a backslash between double quotes begins an escape", "write it twice, or use single quotes"),
    "Invalid hex value": (
        "the escape in the string is not complete",
        "write the backslash twice, or use single quotes",
    ),
    "Unclosed array": ("the array is not closed", "a comma or ] is missing"),
    "Unclosed inline table": ("the table is not closed", "a comma or } is missing"),
    "Cannot overwrite a value": ("stands here twice", "delete one"),
    "Duplicate inline table key": ("a key stands in it twice", "delete one"),
    "Invalid value": ("is not a value", "strings need quotes"),
    "Expected '=' after a key": ("is not key = value", ""),
    "Invalid initial character": ("is not key = value", ""),
    "Invalid statement": ("is not key = value", ""),
    "Expected ']": ("the header is not closed", "[section] or [section.name]"),
    "Expected newline": ("something follows the value", "strings need quotes, comments a #"),
    "Cannot declare": ("this table stands here twice", "join the two"),
    "Cannot mutate": ("this table stands here twice, once as { }", "join the two"),
    "Cannot redefine": ("this table stands here twice", "join the two"),
}
_TRUTH: Final = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false"}
_HEADER: Final = re.compile(r"\s*\[{1,2}([^\[\]#\"']*)(\]?)")
_FIGURE: Final = string.ascii_letters + string.digits + "_.,+-%"  # what a number with its unit is written in
_WORD: Final = _FIGURE + ":/@~"
_COMMENT: Final = re.compile(r"\s*(#.*)?$")
_CURLY: Final = str.maketrans(dict.fromkeys("“”„‟«»", '"') | dict.fromkeys("‘’‚‛", "'"))
_LONG: Final = 80  # letters; what is longer is not repeated in a hint


class Said(NamedTuple):
    """A syntax error in our words. `path` if it is about another key than its statement's; `here`: it stands where the
    parser stopped, wherever its statement began."""

    message: str
    hint: str
    path: Key | None = None
    here: bool = False


def explain(message: str, line: str, column: int, opened_before: bool) -> Said:
    """The error that tomli calls `message`, met at `column` (from 0) of `line`, in a statement that begins before it or
    not."""
    if line.lstrip().startswith("[") and message.startswith(("Expected ']", "Invalid initial")) and not opened_before:
        return _header(line) or _generic(message)
    left, right = line[:column], line[column:]
    if found := _value(message, left, right):
        return Said(*found, here=True)
    if opened_before and not message.startswith(("Cannot", "Duplicate")):
        # What stopped the parser on a later line than its statement's was not closed.
        return Said("is not closed", "a bracket, a brace or quotes are missing")
    return _generic(message, line, right)


def _generic(message: str, line: str = "", right: str = "") -> Said:
    """By tomli's words alone."""
    if message.startswith("Expected newline") and line.lstrip().startswith("["):
        return Said("something follows the header", "keys go on lines of their own")
    said = next((words for start, words in _WORDS.items() if message.startswith(start)), (message, ""))
    if message.startswith("Expected '='") and right.startswith(":"):
        said = said[0], "write = in place of :"
    elif message.startswith("Expected '='") and not right[:1].isascii():
        said = "other letters than a-z in a key need quotes", "no key of vllmd has any"
    return Said(*said)


def _header(line: str) -> Said | None:
    """A header that is none: without a name, or with one that would need quotes. None if it looks right otherwise."""
    if "]" not in line.partition("#")[0]:
        return _generic("Expected ']")
    match = _HEADER.match(line)
    if not match or not match[2]:  # with quotes in it
        return None
    name = match[1].strip()
    section, _, rest = (part.strip() for part in name.partition("."))
    if not name:
        return Said("the header has no name", "[section] or [section.name]", ())
    if not section or "" in (part.strip() for part in name.split(".")):
        what = f"[{spell((section,))}.NAME]" if section else "[section.name]"
        return Said(
            "the header has no name" if not rest else "a name is missing between dots", what, (section or rest,)
        )
    if section == "devices":
        return Said(f"{quote(rest)} needs quotes", f"[{spell((section, rest))}]", (section, rest))
    if section != "models":
        return Said(
            "is no header", "letters, digits, - and _; all else needs quotes", tuple(filter(None, (section, rest)))
        )
    meant = likely_name(rest)
    hint = f"try [{spell((section, meant))}]" if meant and not MODEL_NAME.fullmatch(rest) else NAME_RULE
    if any(letter.isspace() for letter in rest):
        return Said("a name with a space needs quotes, and is no model's name", hint, (section, rest))
    return Said(f"{quote(rest)} is not a model's name", hint, (section, rest))


def _value(message: str, left: str, right: str) -> tuple[str, str] | None:
    """What was written in place of a value, by the text before and after the place where the parser stopped."""
    if message.startswith("Expected '=' after"):
        # { seed = 8,192 }: the parser takes what follows the comma for the next key
        grouped = re.search(r"=\s*(\d{1,3}(?:,\d{3})+)$", left.rstrip())
        return _grouped(grouped[1]) if grouped else None
    if message.startswith("Invalid value"):
        return _no_value(left, right)
    if not message.startswith(("Expected newline", "Unclosed")):
        return None
    if parted := re.search(r"=\s*(\d[\d.]*)[ \t]+$", left):
        return _parted(parted[1], right) if message.startswith("Expected") else None
    word = (left[len(left.rstrip(_FIGURE)) :] + _first(right, _FIGURE)).rstrip(",")
    if len(word) > _LONG:
        return None
    if re.fullmatch(r"[+-]?0\d[\d_]*", word, re.ASCII):
        return f"{word} has a zero in front", f"try {int(word)}"
    if re.fullmatch(r"\d{1,3}(,\d{3})+", word, re.ASCII) and message.startswith("Expected"):
        return _grouped(word)
    if re.fullmatch(r"\d+(\.\d+)?([A-Za-z]+|%)", word, re.ASCII):
        return f"{word} needs quotes", f"try {quote(word)}"
    if message.startswith("Expected") and right.startswith(",") and _COMMENT.match(right[1:]) and "=" in left:
        return "a comma follows the value", "delete it"
    return None


def _no_value(left: str, right: str) -> tuple[str, str] | None:
    """Nothing, a word without quotes, or quotes of another kind."""
    rest = re.split(r"\s#|$", right, maxsplit=1)[0].strip()
    word = _first(right, _WORD).rstrip(",")
    if not rest and left.rstrip().endswith("="):
        return "has no value", ""
    if word.lower() in _TRUTH:
        return f"{word} is not a value", f"try {_TRUTH[word.lower()]}"
    if rest[:1] and rest[:1].translate(_CURLY) != rest[:1]:
        mended = rest.translate(_CURLY)
        return "these are not the quotes of TOML", f"try {mended}" if mended.isprintable() and len(
            mended
        ) < _LONG else ""
    if word and rest.rstrip(",") == word and left.rstrip().endswith("=") and "{" not in left:
        return "is not a value", f"strings need quotes: {quote(word)}"
    return None


def _grouped(digits: str) -> tuple[str, str]:
    return f"{digits} is not a number", f"try {digits.replace(',', '')}"


def _parted(number: str, right: str) -> tuple[str, str] | None:
    """A space inside a number, or before its unit."""
    rest = _first(right, _FIGURE)
    if len(number) + len(rest) > _LONG or not _COMMENT.match(right[len(rest) :]):
        return None
    if re.fullmatch(r"\d{1,3} \d{3}", f"{number} {rest}", re.ASCII):
        return f"{number} {rest} is not a number", f"try {number}{rest}"
    return (f"{number} {rest} needs quotes and no space", f"try {quote(number + rest)}") if rest.isalpha() else None


def _first(text: str, letters: str) -> str:
    """The beginning of `text` that is written in `letters`."""
    return text[: len(text) - len(text.lstrip(letters))]
