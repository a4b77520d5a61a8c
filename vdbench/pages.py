"""Parts of pages that are written from records: what lies between `<!-- name: command -->` and `<!-- /name -->`."""

import re
from pathlib import Path


def shown(page: str, name: str) -> str:
    """What a page shows in that part. Raises ValueError: it has none."""
    return _part(page, name)[0]


def replaced(page: str, name: str, text: str) -> str:
    """The page with that part anew. Raises ValueError: it has none."""
    part = _part(page, name)
    return page[: part.start()] + text + page[part.end() :]


def rewrite(page: Path, name: str, text: str) -> None:
    """Have a page's file show that part anew. Raises ValueError: it has none."""
    page.write_text(replaced(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def _part(page: str, name: str) -> re.Match[str]:
    start = re.search(rf"<!-- {name}: .*? -->\n\n", page)
    part = start and re.compile(rf".*?(?=\n\n<!-- /{name} -->)", re.DOTALL).match(page, start.end())
    if not part:
        raise ValueError(f"the page has no part {name}")
    return part
