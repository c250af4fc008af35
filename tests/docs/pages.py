"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
FENCE = re.compile(
    r"(?:^<!-- example: (?P<mark>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text, and the mark above it (`<!-- example: ... -->`), if any."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """All blocks of these languages, page by page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            if match["language"] in languages:
                line = text.count("\n", 0, match.start("text"))
                name = page.relative_to(ROOT).as_posix()
                found.append(Block(name, line, match["language"], match["text"], match["mark"] or ""))
    return found


def commands(block: Block) -> Iterator[str]:
    """The commands of a shell block; one goes on to the next line after a backslash or inside quotes."""
    pending = ""
    for line in block.text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # No closing quotation.
            pending += "\n"
            continue
        if words:
            yield pending
        pending = ""
    assert not pending, f"{block}: the last command has no end"
