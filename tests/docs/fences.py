"""The fenced blocks of the documentation, the commands in them, and the marks that say how they are run.

A mark is a comment of its own in the line above a block; the page that a reader sees does not show it:

    <!-- not run: needs a GPU -->            nothing of the block is run; the reason starts with one of `REASONS`
    <!-- slow: trains for a minute -->       run with the slow tests alone
    <!-- run without: --task hellaswag -->   these words are left out when it is run
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = ("needs a GPU", "needs an engine", "needs the network", "needs data", "needs hours", "a sketch")
SHELL = ("bash", "console", "")
TOOLS = ("equipoise", "python", "pip", "make", "export", "vllm", "torchrun")
"""First words by which a block that names no language is known to hold commands."""
MARK = re.compile(r"<!--\s*(not run|slow|run without):\s*(.*?)\s*-->")
FENCE = re.compile(r"( *)```(\w*)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page.

    Attributes:
        page: its path from the root of the repository.
        line: number of its opening fence.
        language: as the fence names it; empty where it names none.
        text: what is between the fences.
        marks: what its comments say: mark -> reason or words.
    """

    page: str
    line: int
    language: str
    text: str
    marks: dict[str, str]

    @property
    def where(self) -> str:
        """Where a reader finds it."""
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """One command line of a block: its words, the variables set before it, and the file that takes its output."""

    where: str
    words: tuple[str, ...]
    variables: dict[str, str]
    into: str | None


def name_of(page: Path) -> str:
    """A page's path from the root of the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    marks: dict[str, str] = {}
    opened: tuple[int, str, str] | None = None
    held: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, held = (number, fence[1], fence[2]), []
        elif opened is not None and line.strip() == "```":
            start, indent, language = opened
            text = "\n".join(one.removeprefix(indent) for one in held)
            found.append(Block(name_of(page), start, language, text, marks))
            opened, marks = None, {}
        elif opened is not None:
            held.append(line)
        elif line.strip():
            marks = dict(MARK.findall(line)) | (marks if MARK.search(line) else {})
    assert opened is None, f"{page}: the block that starts in line {opened and opened[0]} does not end"
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block; none where it holds something else. A line after "$ " is a command, the others its output."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language not in SHELL:
        return
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    elif block.language != "bash":
        lines = [line for line in lines if _words(line)[1][:1] and _words(line)[1][0] in TOOLS]
    for line in lines:
        variables, words = _words(line)
        if not words:
            continue
        into = None
        if ">" in words:
            into = words[words.index(">") + 1]
            words = words[: words.index(">")]
        yield Command(f"{block.where}: {line.strip()}", tuple(words), variables, into)


def _words(line: str) -> tuple[dict[str, str], list[str]]:
    """Variables set before a command, and its words; nothing for a line that no shell would read."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return {}, []
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every code span outside fenced blocks."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            for span in SPAN.findall(line):
                yield number, span
