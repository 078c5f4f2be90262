"""Pages lead to one another, and what they name is there."""

import re

import pytest

from tests.unit.docs_pages import PAGES, ROOT, name_of, page, prose

NAMES = [name_of(path) for path in PAGES]
LINK = re.compile(r"\]\(([^)\s]+)\)")
_FOLDERS = r"(?:reinforcer_tp|kernels|tests|benchmarks|configs|slurm|docs)"


def anchors(name: str) -> set[str]:
    """The ids that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(name), flags=re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("name", NAMES)
def test_links_between_pages_lead_somewhere(name):
    for target in LINK.findall(prose(name)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists(), f"{name} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(name_of(path)), f"{name} links to {target}: no such heading"


def test_every_page_is_in_the_index():
    linked = set(LINK.findall(prose("docs/README.md")))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= linked
    assert "docs/README.md" in LINK.findall(prose("README.md"))


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name):
    endings = r"\.(?:py|yaml|sh|md|jsonl|png)"
    for path in set(re.findall(rf"\b{_FOLDERS}/[\w./-]+{endings}\b", page(name))):
        assert (ROOT / path).is_file(), f"{name} names {path}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_fill_in(name):
    assert not re.search(r"@@|TODO|TBD|XXX", page(name))
