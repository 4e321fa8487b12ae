"""The pages that people read, as the tests see them: their code, links and anchors.

Nothing here needs vLLM or a build: what pages say is compared with the text of the sources.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
CONTROL = ("control/src/**/*.rs", "control/*/src/**/*.rs")
"""Sources of the control plane: of its binary, and of its crates."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Page:
    """One page."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """Language and text of every fenced block."""
        return FENCE.findall(self.text)

    @cached_property
    def prose(self) -> str:
        """Everything outside fenced blocks."""
        return FENCE.sub("", self.text)

    @cached_property
    def spans(self) -> list[str]:
        """Every piece of code within a line of prose, on one line."""
        return [" ".join(text.split()) for _, text in SPAN.findall(self.prose)]

    @cached_property
    def code(self) -> list[str]:
        """Every span, and every line of a block."""
        lines = [line for _, text in self.blocks for line in text.splitlines()]
        return self.spans + lines

    @cached_property
    def commands(self) -> list[str]:
        """Every span, and every command of a shell block, without comments and on one line."""
        shell = "".join(text for language, text in self.blocks if language == "sh")
        whole = re.sub(r"\\\n\s*", " ", shell)
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in whole.splitlines()]
        return self.spans + [line for line in lines if line]

    @cached_property
    def links(self) -> list[str]:
        """Targets of links."""
        return LINK.findall(SPAN.sub("", self.prose))

    @cached_property
    def anchors(self) -> set[str]:
        """What a link may name behind `#`, as GitHub makes it of headings."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
        return {heading.replace(" ", "-") for heading in plain}

    def table(self, first_column: str) -> list[list[str]]:
        """Rows of the table whose head begins with this column."""
        lines = self.text.splitlines()
        start = next(
            i
            for i, line in enumerate(lines)
            if re.match(rf"\| *{re.escape(first_column)} *\|", line)
        )
        rows = []
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        return rows


README = Page(ROOT / "README.md")
PAGES = [
    README,
    *(Page(path) for path in sorted((ROOT / "docs").glob("*.md"))),
    Page(ROOT / "python" / "tests" / "README.md"),
    Page(ROOT / "control" / "tests" / "kube" / "recorded" / "README.md"),
]


def page(name: str) -> Page:
    """A page by its path."""
    return next(each for each in PAGES if str(each) == name)


def sources(*patterns: str) -> dict[Path, str]:
    """Path → text of sources."""
    found = {
        path: path.read_text()
        for pattern in patterns
        for path in sorted(ROOT.glob(pattern))
        if path.is_file() and "target" not in path.relative_to(ROOT).parts
    }
    assert found, f"no source is named {patterns}"
    return found


def text_of(*patterns: str) -> str:
    """The text of sources, one behind the other."""
    return "\n".join(sources(*patterns).values())
