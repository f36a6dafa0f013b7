"""Text from tasks, tokens and names, made safe where it is shown: terminals, figures, Markdown, LaTeX, HTML, CSV.

What a reader sees is the text itself: a task "a<b" is shown as "a<b". Nothing in it acts as markup.
"""

from __future__ import annotations

import html
import re
import unicodedata

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # reorder what follows
_HIDDEN = ("Cc", "Cs", "Cn", "Zl", "Zp")  # controls, lone surrogates, unassigned, line and paragraph separators
_FIGURE = str.maketrans({"&": "&amp;", "<": "&lt;", "$": "&#36;"})
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_FORMULA = re.compile(r"'*\s*[=+\-@\t\r\n＝＋－＠]")
_LATEX = str.maketrans({
    **{letter: f"\\{letter}" for letter in "{}$&#%_"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\char34{}", "`": r"\textasciigrave{}",
})  # fmt: skip
# Markup that Markdown would see within a line; an underscore within a word is none.
_MARKDOWN = re.compile(r"([\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[]))")


def visible(text: str) -> str:
    r"""The text on one line, with invisible and reordering characters written as escapes ("\n", "\u202e").

    It cannot move a terminal's cursor, change its colors or hide part of itself.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        ascii(letter)[1:-1] if letter in _BIDI or unicodedata.category(letter) in _HIDDEN else letter
        for letter in text
    )  # fmt: skip


def figure_text(text: object) -> str:
    """The text, escaped for any part of a Plotly figure, which then shows it unchanged.

    Plotly interprets tags (<b>, <a href>), entities, `%{...}` in hovers and, if MathJax is loaded, `$...$`.
    """
    return visible(str(text)).translate(_FIGURE).replace("%{", "%&#123;")


def markdown_text(text: object) -> str:
    """The text, escaped for a cell of a Markdown table: no pipe, HTML, emphasis, code, link or math takes effect."""
    escaped = _MARKDOWN.sub(r"\\\1", visible(str(text)))
    return re.sub(r"&(?=#?\w+;)", "&amp;", escaped).replace("<", "&lt;")


def latex_text(text: object) -> str:
    r"""The text for a cell, a caption or a note of LaTeX: no command runs, no cell or row ends.

    Neither dashes nor quotation marks run together, and no bracket or star at the beginning is taken for an argument of
    the row's end before it.
    """
    escaped = visible(str(text)).translate(_LATEX)
    apart = re.sub(r"(?<=([-',]))(?=\1)", "{}", escaped)
    return f"{{}}{apart}" if apart.startswith(("[", "*")) else apart


def html_text(text: object) -> str:
    """The text for an HTML page or an attribute in quotation marks: no tag and no entity shows or runs."""
    return html.escape(visible(str(text)))


def csv_text(text: str) -> str:
    """The text for a cell of a CSV file; an apostrophe precedes one that a spreadsheet would run as a formula.

    Numbers are unchanged. `text_of_csv` is the inverse.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def text_of_csv(cell: str) -> str:
    """The text from which `csv_text` made the cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
