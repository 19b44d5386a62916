"""Text of records that does nothing where it is shown: no terminal, spreadsheet or page runs it.

A run, a model or a text may have any name, and an error may quote anything.
"""

import re
import unicodedata

FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""What begins a cell that a spreadsheet runs, also in full width and after white space."""

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of what has no picture, and may move the cursor or turn the line around."""


def visible(text: str, keep: str = "") -> str:
    r"""Return text in which control characters are written out: `\x1b`, `\n`, `\u202e`.

    Args:
        text: any.
        keep: characters that stay as they are.
    """
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in UNSEEN
        else character.encode("unicode_escape").decode()
        for character in text
    )


def escape_spreadsheet(text: str) -> str:
    """Return a cell of text that a spreadsheet shows and does not run; numbers are as they are.

    A carriage return is written out, since Python's csv module does not quote it.
    """
    shown = visible(text, keep="\t\n")
    if FORMULA.match(shown) and not NUMBER.fullmatch(shown):
        return f"'{shown}"
    return shown


def escape_markdown(text: str) -> str:
    """Return a cell of a Markdown table that shows a text as it is: no cell, HTML, link or code."""
    shown = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", shown)
