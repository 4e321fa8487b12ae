"""The parts of docs/benchmarks.md that measuring writes."""

from __future__ import annotations

from bench.provenance import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"


def replace(part: str, text: str) -> None:
    """Puts `text` between the page's markers `<!-- part:begin -->` and `<!-- part:end -->`."""
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, rest = PAGE.read_text().split(begin)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
