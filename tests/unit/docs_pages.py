"""The pages that people read, taken apart: text, code blocks, commands, tables."""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)


def page(name: str) -> str:
    """The text of a page by its path in the repository, without HTML comments."""
    return re.sub(r"<!--.*?-->", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [text for found, text in _FENCE.findall(page(name)) if found == language]


def prose(name: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page(name))


def commands(name: str) -> list[str]:
    """The commands of a page's bash blocks: lines joined, comments taken off."""
    found = []
    for text in blocks(name, "bash"):
        lines = text.replace("\\\n", " ").splitlines()
        found += [re.sub(r"\s+#\s.*$", "", line) for line in lines]
    return [" ".join(line.split()) for line in found if line and not line.startswith("#")]


def all_commands() -> list[tuple[str, str]]:
    """(page, command) of every page, each command once a page."""
    named = [(name_of(path), commands(name_of(path))) for path in PAGES]
    return [(name, command) for name, found in named for command in dict.fromkeys(found)]


def section(name: str, title: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    text = page(name)
    start = re.search(rf"^(#+) {re.escape(title)}$", text, flags=re.M)
    assert start, f"{name} has no heading {title!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", rest, flags=re.M)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of every row of a text's tables, headings and rules left out."""
    found = []
    lines = [*text.splitlines(), ""]
    for line, following in itertools.pairwise(lines):
        if not line.startswith("|") or re.match(r"^\|[-|]+\|$", line):
            continue
        if re.match(r"^\|[-|]+\|$", following):  # a heading
            continue
        found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found
