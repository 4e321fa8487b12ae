"""What pages point to: links, anchors, files of this repository."""

import re

import pytest

from bench.tests import pages
from bench.tests.pages import PAGES, ROOT, Page

FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"target"}
WRITTEN_LATER = ("python/kvtide/_native.abi3.so", "bench/results/gpu_plots.json")
"""Files that building or measuring makes."""


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_a_file_and_anchors_to_a_heading(page: Page) -> None:
    wrong = []
    for link in page.links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = Page((page.path.parent / name).resolve()) if name else page
        if not target.path.exists() or (anchor and anchor not in target.anchors):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_are_named_exist(page: Page) -> None:
    named = [
        name.rstrip("/")
        for span in page.spans
        for name in re.findall(r"(?<![\w./-])(?:[\w-]+/)+[\w.-]*\w", span)
        if name.split("/")[0] in FOLDERS
    ]
    inside = [page.path.parent, ROOT]
    assert not [
        name
        for name in named
        if name not in WRITTEN_LATER and not any((folder / name).exists() for folder in inside)
    ]


@pytest.mark.parametrize(
    ("page", "pattern"),
    [
        ("docs/contributing.md", "python/kvtide/*.py"),
        ("docs/contributing.md", "bench/*.py"),
        ("docs/contributing.md", "bench/*/__main__.py"),
        ("python/tests/README.md", "python/tests/test_*.py"),
    ],
)
def test_the_layout_names_every_part(page: str, pattern: str) -> None:
    files = [path for path in ROOT.glob(pattern) if path.name != "__init__.py"]
    assert files
    said = " ".join(pages.page(page).spans)
    names = [path.parent.name if path.name == "__main__.py" else path.name for path in files]
    assert not [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said)]
