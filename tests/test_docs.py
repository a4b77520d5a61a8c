"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

import vdbench
from vdbench import pages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "vdbench" / "sparse" / "README.md"]


def is_there(name: str) -> bool:
    """Whether a user has it after `import vdbench`, or it is a file or folder of the package."""
    if ROOT.joinpath(*name.split(".")).with_suffix(".py").exists() or ROOT.joinpath(*name.split(".")).is_dir():
        return True
    found = vdbench
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_names_of_the_package_resolve(page):
    named = re.findall(r"\bvdbench(?:\.[A-Za-z]\w*)+(?![\w/-])", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not is_there(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_parts_of_pages_are_replaced_and_nothing_else():
    page = (
        "a\n<!-- one: `make one` -->\n\nold\n\n<!-- /one -->\nb\n<!-- two: `make two` -->\n\nolder\n\n<!-- /two -->\n"
    )
    assert (pages.shown(page, "one"), pages.shown(page, "two")) == ("old", "older")
    assert pages.replaced(page, "two", r"new \1") == page.replace("older", r"new \1")
    with pytest.raises(ValueError, match="the page has no part three"):
        pages.shown(page, "three")
