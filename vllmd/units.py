"""Sizes and durations as people write and read them. Inside vllmd a size is bytes, a time is seconds."""

import re

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)((?:[KMGT]i?)?B)")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|min|s|m|h|d)")


def parse_size(text: str) -> int:
    """Bytes of "9GiB", "512MiB", "2GB" (decimal). The unit is needed and stands directly after the number.

    Raises ValueError with what is wrong and the nearest right spelling.
    """
    match = _SIZE.fullmatch(text)
    if match:
        return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])
    loose = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text, re.IGNORECASE)
    hint = f'"{loose[1]}{loose[2].upper() or "G"}iB"' if loose else '"9GiB" or "512MiB"'
    raise ValueError(f'"{text}" is not a size (try {hint})')


def parse_duration(text: str) -> float:
    """Seconds of "180s", "10m", "1h30m", "250ms". Raises ValueError with a spelling that works."""
    parts = _DURATION_PART.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * _TIME_UNITS[unit] for number, unit in parts)
    bare = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", text)
    hint = f'"{bare[1]}s"' if bare else '"180s", "10m" or "1h30m"'
    raise ValueError(f'"{text}" is not a duration (try {hint})')


def gib(size: float) -> str:
    """A size for a sentence: "5.0 GiB"; below 0.05 GiB in MiB or KiB, so that small things do not read as 0."""
    if 0 < size < MIB:
        return f"{size / KIB:.0f} KiB"
    if 0 < size < 0.05 * GIB:
        return f"{size / MIB:.0f} MiB"
    return f"{size / GIB:.1f} GiB"


def gib_of(part: float, whole: float) -> str:
    """Two sizes with one unit: "1.1 of 11.4 GiB"."""
    return f"{part / GIB:.1f} of {whole / GIB:.1f} GiB"


def spell_size(size: int) -> str:
    """A size as one would write it in the configuration: the largest binary unit that divides it."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size}B"


def span(seconds: float) -> str:
    """A time for a sentence, in its one or largest unit: "42 s", "12 min", "2 h", "3 d"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def count(number: int, noun: str, nouns: str = "") -> str:
    """ "1 model", "3 models"; `nouns` where an s is not enough."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"
