"""Tables of measured figures in pages: Markdown between marks, which programs write anew."""

import re
from collections.abc import Iterable, Mapping, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], column: str = "---") -> str:
    """A table; ``column`` is the rule below the name of every column but the first, ``--:`` for numbers."""
    lines = ["".join(f"| {cell} " if cell else "| " for cell in cells) + "|" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---|" + f"{column}|" * (len(head) - 1), *lines[1:]])


def fill_tables(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with the tables, by name, between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises:
      KeyError: the page has marks for another table.
    """
    found = re.compile(r"(<!-- table: ([\w ]+) -->)\n.*?(<!-- end -->)", re.DOTALL)
    return found.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", page)
