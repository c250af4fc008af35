"""Links lead somewhere, files that the pages name exist, and the README is short and lists the rooms that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT
from tests.test_imports import PIPELINE_ROWS

README = ROOT / "README.md"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:docs|examples|graphhash|mlflow_projects|pipeline|serving|tests)/[\w./-]*)`")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if ROOT / "docs" in page.parents:
            assert ROOT / "docs" in target.parents, f"{page.name} links to {link}, which is not on the site"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("it names files of the past")
    for name in NAMED_FILE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_functions_that_the_walk_of_a_newcomer_names_are_there():
    walk = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## A newcomer's walk")[1].split("\n## ")[0]
    file = ""
    for word in re.findall(r"`([^`]+)`", walk):
        if word.endswith(".py"):
            file = (ROOT / word).read_text(encoding="utf-8")
        elif "/" not in word:
            assert re.search(rf"^(def {word}\(|{word}\b.*=)", file, re.MULTILINE), f"no {word}"


def test_the_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_tree_of_the_readme_lists_the_rooms_that_are_there():
    tree = README.read_text(encoding="utf-8").split("## The tree")[1].split("\n## ")[0]
    firsts = re.findall(r"^\| (`.+?) \|", tree, re.MULTILINE)
    listed = [name for first in firsts for name in re.findall(r"`([\w/]+)/`", first)]
    inits = [
        path for package in ("graphhash", "pipeline", "serving") for path in (ROOT / package).glob("**/__init__.py")
    ]
    assert set(listed) == {path.parent.relative_to(ROOT).as_posix() for path in inits} - {"graphhash", "pipeline"}
    assert len(listed) == len(set(listed))


def test_every_page_of_docs_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if ROOT / "docs" in page.parents}
    assert set(re.findall(r"[\w/-]+\.md", nav)) == pages


def test_the_architecture_page_shows_the_rows_that_are_tested():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = [re.findall(r"`(\w+)(?:/|\.py)`", cell) for cell in re.findall(r"^\| \d+ \| (.+?) \|", page, re.MULTILINE)]
    rows = {room: number for number, row in enumerate(PIPELINE_ROWS) for room in row if not room.startswith("__")}
    assert {room for row in shown for room in row} == set(rows)
    tested = [rows[room] for row in shown for room in row]
    assert tested == sorted(tested)
