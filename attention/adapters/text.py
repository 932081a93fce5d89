"""Text that was read from a file, made fit for an error message, a log line or a terminal."""

from __future__ import annotations

MAX_SHOWN = 80


def shown(value: object, limit: int = MAX_SHOWN) -> str:
    r"""A value as one short line of printable characters.

    Escape codes, line breaks and NUL are written as Python escapes, so that a file cannot repaint
    a terminal or fill a log.

    >>> shown("red \x1b[31m")
    'red \\x1b[31m'
    >>> shown("a" * 1000, limit=4)
    'aaaa... (1,000 characters)'
    """
    text = str(value)
    escaped = "".join(_escaped(character) for character in text[:limit])
    if len(text) <= limit and len(escaped) <= limit:
        return escaped
    return f"{escaped[:limit]}... ({len(text):,} characters)"


def quoted(value: object, limit: int = MAX_SHOWN) -> str:
    """The same in quotation marks: where text begins and ends is part of what it says."""
    return f"'{shown(value, limit)}'"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
