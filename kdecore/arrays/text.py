"""Tables of names and what they say, as text and as HTML: what reports print."""

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

Rows: TypeAlias = Sequence[tuple[str, str]]
"""Names, and what is said of them."""
LONGEST_LINE = 120


def as_text(rows: Rows) -> str:
    """Return a line for each row, with what is said in one column."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {said}" for name, said in rows)


def as_lines(rows: Rows) -> str:
    """Return the same, with lines that are cut where they are long."""
    lines = as_text(rows).split("\n")
    return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 2].rstrip()} …" for line in lines)


def as_html(rows: Rows, more: str) -> str:
    """Return rows as a table, and below it what else there is, to be unfolded."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(said)}</td></tr>" for name, said in rows)
    return f"<table>{cells}</table><details><summary>details</summary><pre>{escape(more)}</pre></details>"
