"""One line of vLLM's output taken apart: who wrote it, how serious it is, and the words.

vLLM's logger writes `(EngineCore pid=12) ERROR 11-24 01:42:29 [core.py:1] words`, each line of a traceback alike, or
JSON where told to; uvicorn writes `INFO:     words`; progress bars, warnings and uncaught tracebacks come bare.
"""

import json
import re
from dataclasses import dataclass

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
    """Never fails: what is no record is bare text."""
    if line.startswith("{") and (record := _from_json(line)) is not None:
        return record
    if match := _RECORD.search(line):  # search: a bar that was being drawn may stand before it
        return LogLine(match["process"] or "", match["level"], match["text"])
    if match := _BARE.match(line):
        return LogLine(match["process"], "", match["text"])
    if match := _UVICORN.match(line):
        return LogLine("", match["level"], match["text"])
    return LogLine("", "", line)


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
    except ValueError:
        return None
    if not isinstance(fields, dict) or "message" not in fields:
        return None
    process = fields.get("vllm_process_name") or fields.get("processName") or ""
    text = f"{fields['message']}\n{fields['exc_info']}" if fields.get("exc_info") else str(fields["message"])
    return LogLine(str(process), str(fields.get("levelname", "")), text)
