"""What is printed: text that did not come from the code drives no terminal, and no encoding ends a run."""

import sys
import unicodedata

JOINERS = "\u200c\u200d"  # part of the spelling of several scripts


def visible(text: str) -> str:
    """The text without what could move the cursor, reorder or hide: control characters and escape sequences,
    bidirectional overrides, halves of a character. Ends of lines stay, tabs become spaces."""

    def harmless(c: str) -> bool:
        return c.isprintable() or c == "\n" or c in JOINERS or unicodedata.category(c) == "Zs"

    text = str(text).replace("\r\n", "\n").expandtabs(4)
    return "".join(c if harmless(c) else "�" for c in text)


def print_anything() -> None:
    """A character that the terminal's encoding lacks is printed as \\u…, not raised as an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it is closed
            stream.reconfigure(errors="backslashreplace")
