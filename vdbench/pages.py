"""Parts of pages that are written from records: what lies between `<!-- name: command -->` and `<!-- /name -->`."""

import re


def shown(page: str, name: str) -> str:
    """What a page shows in that part. Raises ValueError: it has none."""
    return _part(page, name)[0]


def replaced(page: str, name: str, text: str) -> str:
    """The page with that part anew. Raises ValueError: it has none."""
    part = _part(page, name)
    return page[: part.start()] + text + page[part.end() :]


def _part(page: str, name: str) -> re.Match[str]:
    start = re.search(rf"<!-- {name}: .*? -->\n\n", page)
    part = start and re.compile(rf".*?(?=\n\n<!-- /{name} -->)", re.DOTALL).match(page, start.end())
    if not part:
        raise ValueError(f"the page has no part {name}")
    return part
