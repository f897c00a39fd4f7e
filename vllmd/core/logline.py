"""One line of vLLM's output taken apart: who wrote it, how serious it is, and the words.

vLLM's logger writes `(EngineCore pid=12) ERROR 11-24 01:42:29 [core.py:1] words`, each line of a traceback alike, or
JSON where told to; uvicorn writes `INFO:     words`; progress bars, warnings and uncaught tracebacks come bare.

An engine may print anything: what is read here is bounded first, and no line can cost more than its length.
"""

import json
import re
from dataclasses import dataclass

LONGEST = 4096  # characters of a line that are looked at: its beginning and its end

_RECORD = re.compile(
    r"(?:\((?P<process>[^()]*?) pid=\d+\) )?(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) "
    r"\d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?(?P<text>.*)"
)
_BARE = re.compile(r"\((?P<process>[^()]*?) pid=\d+\) (?P<text>.*)")
_UVICORN = re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL):\s+(?P<text>.*)")

_SEVERITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_LETTERS = {"I": 6, "W": 4, "E": 3, "F": 2}
_CPP = re.compile(r"\[?([IWEF])\d{4} \d\d:\d\d:\d\d")  # PyTorch's C++ side: "[W1124 01:53:11.749398921 utils.cpp:68]"
_WARNS = re.compile(r"(?:\S+:\d+: )?(?:\w+\.)*\w*Warning: ")
_FAILS = re.compile(
    r'Traceback \(most recent call last\):|  File ".*", line \d+|(?:\w+\.)*\w*(?:Error|Exception|ExceptionGroup)(?::|$)'
    r"|Fatal Python error: |terminate called "
)


@dataclass(frozen=True, slots=True)
class LogLine:
    """`process` is vLLM's name ("APIServer", "EngineCore_DP0", "Worker_TP1"), `level` as in Python's logging; both ""
    where the line does not tell."""

    process: str
    level: str
    text: str


def parse(line: str) -> LogLine:
    """Never fails: what is no record is bare text. No text is longer than LONGEST."""
    if line.startswith("{") and (record := _from_json(line)) is not None:
        return record
    line = shorten(line)
    if match := _RECORD.search(line):  # search: a bar that was being drawn may stand before it
        return LogLine(match["process"] or "", match["level"], match["text"])
    if match := _BARE.match(line):
        return LogLine(match["process"], "", match["text"])
    if match := _UVICORN.match(line):
        return LogLine("", match["level"], match["text"])
    return LogLine("", "", line)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Without its middle, if it is longer than that: a traceback ends with what is wrong."""
    half = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def severity(line: str) -> int:
    """How serious a line is, as syslog counts: 2 critical, 3 error, 4 warning, 6 info, 7 debug; 6 for one that does not
    tell. A bare traceback tells by its head, its frames and its last line."""
    said = parse(line)
    if said.level:
        return _SEVERITIES.get(said.level.upper(), 6)
    if match := _CPP.match(said.text):
        return _LETTERS[match[1]]
    if _WARNS.match(said.text):
        return 4
    return 3 if _FAILS.match(said.text) else 6


def _from_json(line: str) -> LogLine | None:
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict) or "message" not in fields:
            return None
        process = str(fields.get("vllm_process_name") or fields.get("processName") or "")
        text, trace = str(fields["message"]), fields.get("exc_info")
        level = str(fields.get("levelname", ""))
        return LogLine(process[:80], level[:20], shorten(f"{text}\n{trace}" if trace else text))
    except (ValueError, RecursionError):  # nested beyond all measure, for one
        return None
