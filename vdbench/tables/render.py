"""Numbers to text, and one table document to HTML, Markdown, LaTeX, CSV and the terminal."""

import html
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from vdbench.records import atomic_write
from vdbench.stats import Summary

NOTHING = "–"
_TERMINAL_CELL = 50  # wider text is broken over lines
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; margin: 2em; color: #222; }}
h1 {{ font-size: 1.4em; }} h2 {{ font-size: 1.1em; margin-top: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; }}
ul {{ max-width: 60em; color: #555; }}
</style></head><body>
{body}
</body></html>
"""
_LATEX = str.maketrans(
    {character: rf"\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"$<$",
        ">": r"$>$",
        "≥": r"$\ge$",
        "|": r"$|$",
        "±": r"$\pm$",
        "×": r"$\times$",
        "−": r"$-$",
        "–": "--",
        "µ": r"$\mu$",
        "α": r"$\alpha$",
    }
)


@dataclass(frozen=True)
class Section:
    heading: str
    frame: pd.DataFrame


@dataclass
class Document:
    """A table as readers see it: every cell is text already. `numbers` is the same for machines, the CSV."""

    title: str
    label: str
    numbers: pd.DataFrame
    sections: list[Section] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def fixed(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:+.{digits}f}".replace("-", "−")


def ratio_digits(value: float) -> int:
    """Decimals for a ratio: three significant digits, none below one."""
    return 0 if value >= 99.95 else 1 if value >= 9.995 else 2


def plus_minus(summary: Summary | None, digits: int) -> str:
    """mean ± sample standard deviation; the mean alone for one value."""
    if summary is None:
        return NOTHING
    spread = "" if summary.std is None else f" ± {summary.std:.{digits}f}"
    return f"{summary.mean:.{digits}f}{spread}"


def ratio(summary: Summary | None) -> str:
    """A ratio with sensible digits; a plain 1 where nothing was removed."""
    if summary and summary.mean == 1:
        return "1"
    return plus_minus(summary, ratio_digits(summary.mean) if summary else 0)


def percent(value: float) -> str:
    """One decimal, or as many as it takes not to round 99.97 up to 100."""
    digits = 1
    while value < 100 <= round(value, digits):
        digits += 1
    return f"{value:.{digits}f}"


def interval(bounds: tuple[float, float] | None, digits: int) -> str:
    return NOTHING if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return text.translate(_LATEX)


def to_text(frame: pd.DataFrame, style: str = "simple") -> str:
    width = _TERMINAL_CELL if style == "simple" else None
    return tabulate(frame.to_dict("list"), headers="keys", tablefmt=style, disable_numparse=True, maxcolwidths=width)


def to_markdown(document: Document) -> str:
    parts = [f"# {document.title}"]
    for section in document.sections:
        parts += [f"## {section.heading}", to_text(section.frame.map(lambda c: c.replace("|", r"\|")), "pipe")]
    if document.notes:
        parts.append("\n".join(f"- {note}" for note in document.notes))
    return "\n\n".join(parts) + "\n"


def to_html(document: Document) -> str:
    """A page of its own, for a browser or a report."""
    parts = [f"<h1>{html.escape(document.title)}</h1>"]
    for section in document.sections:
        parts += [f"<h2>{html.escape(section.heading)}</h2>", section.frame.to_html(index=False, border=0)]
    if document.notes:
        items = "\n".join(f"<li>{html.escape(note)}</li>" for note in document.notes)
        parts.append(f"<ul>\n{items}\n</ul>")
    return _PAGE.format(title=html.escape(document.title), body="\n".join(parts))


def to_latex(document: Document) -> str:
    """One table a section, then the notes as an itemize; the preamble needs the packages in the first line."""
    parts = [f"% {document.title}; needs \\usepackage{{booktabs,adjustbox}}"]
    for number, section in enumerate(document.sections, start=1):
        escaped = section.frame.map(latex).rename(columns=latex)
        tabular = escaped.to_latex(index=False, escape=False, column_format="l" * escaped.shape[1]).rstrip()
        parts.append(
            "\\begin{table}[tbp]\n\\centering\\small\n"
            f"\\caption{{{latex(section.heading)}}}\n\\label{{tab:{document.label}-{number}}}\n"
            f"\\begin{{adjustbox}}{{max width=\\textwidth}}\n{tabular}\n\\end{{adjustbox}}\n\\end{{table}}"
        )
    if document.notes:
        items = "\n".join(rf"\item {latex(note)}" for note in document.notes)
        parts.append(f"\\begin{{itemize}}\\small\n{items}\n\\end{{itemize}}")
    return "\n\n".join(parts) + "\n"


def write(document: Document, folder: Path) -> list[Path]:
    """One file a format, named after the document's label."""
    texts = {
        "html": to_html(document),
        "csv": document.numbers.to_csv(index=False, lineterminator="\n", float_format="%.9g"),
        "md": to_markdown(document),
        "tex": to_latex(document),
    }
    paths = []
    for extension, text in texts.items():
        path = folder / f"{document.label}.{extension}"
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths
