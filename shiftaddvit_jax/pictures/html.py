"""Parts of a page of HTML in a single file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from matplotlib.figure import Figure

from shiftaddvit_jax.pictures.style import render_figure

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #8885; }
th, td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { vertical-align: bottom; }
tr:last-child.total td { font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption, .note { color: GrayText; font-size: .9rem; } summary { cursor: pointer; margin: .5rem 0; }
"""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page; its style is for light and dark screens."""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    )
    return f"{head}\n<body>\n{chr(10).join([f'<h1>{escape(title)}</h1>', *sections])}\n</body></html>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], has_total: bool = False) -> str:
    """A table of text; with ``has_total``, its last row stands out."""

    def row(cells, tag, kind=""):
        return f"<tr{kind}>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    kind = ' class="total"' if has_total else ""
    body = "\n".join(row(cells, "td", kind) for cells in rows)
    return f'<div class="scroll"><table><thead>{row(head, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def figure(figure: Figure, caption: str) -> str:
    """A figure as an SVG in an image of its own, so that no two figures' names can clash."""
    source = "data:image/svg+xml;base64," + base64.b64encode(render_figure(figure, "svg")).decode()
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def details(title: str, body: str) -> str:
    """What a click on ``title`` shows."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph in gray."""
    return f'<p class="note">{escape(text)}</p>'
