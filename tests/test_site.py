"""The pages of docs/ form a site: all are in its menu, every link leads somewhere, pictures are what commands draw."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from typer.testing import CliRunner

from pipecompile.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them from headings; a reference page has those of its names too."""
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text_of(page)))
    return {re.sub(r"[\s-]+", "-", each.strip()) for each in words}


def targets(page: Path) -> list[str]:
    return [unquote(link) for link in LINK.findall(text_of(page)) if "://" not in link]


def broken(page: Path) -> list[str]:
    found = []
    for link in targets(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        leaves = page.is_relative_to(DOCS) and not target.is_relative_to(DOCS)  # of a site, there is nothing else
        if not target.exists() or leaves or (anchor and re.sub("-+", "-", anchor) not in anchors(target)):
            found.append(link)
    return found


def menu(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for each in values for page in menu(each)]


def test_every_page_is_in_the_menu_once() -> None:
    listed = menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(PAGES) > 25
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_every_link_leads_to_a_page_and_a_heading() -> None:
    pages = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    assert sum(len(targets(page)) for page in pages) > 80
    assert {page.name: broken(page) for page in pages if broken(page)} == {}


def test_a_broken_link_would_show(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[here](#a-heading) [there](#another) [away](missing.md)\n")
    assert broken(page) == ["#another", "missing.md"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_the_pictures_of_schedules_are_what_the_command_draws(schedule: str, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.svg"
    asked = ["schedule", schedule, "--stages", "4", "--microbatches", "8", "--svg", str(drawn)]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert drawn.read_text() == (DOCS / "images" / f"{schedule}.svg").read_text()


def test_every_picture_is_shown() -> None:
    shown = {Path(link).name for page in PAGES for link in targets(page)}
    assert {file.name for file in (DOCS / "images").iterdir()} <= shown


def test_every_public_name_is_in_the_reference() -> None:
    import pipecompile

    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    errors = "::: pipecompile.errors" in reference
    missing = [
        name
        for name in pipecompile.__all__
        if f"::: pipecompile.{name}\n" not in reference
        and not (errors and getattr(pipecompile, name).__module__ == "pipecompile.errors")
    ]
    assert missing == []


def entries() -> dict[str, dict[str, Any]]:
    """The options of each name in the reference that has some."""
    entry = re.compile(r"^::: (\S+)\n((?: +.*\n)+)", re.MULTILINE)
    pages = [page.read_text() for page in (DOCS / "reference").glob("*.md")]
    return {name: yaml.safe_load(text)["options"] for page in pages for name, text in entry.findall(page)}


def test_members_that_the_reference_lists_are_shown() -> None:
    found = entries()
    assert "pipecompile.Pipeline" in found
    for name, options in found.items():
        documented = resolve_name(name)
        inherited = {member for base in getattr(documented, "__mro__", ())[1:] for member in vars(base)}
        left_out = inherited.intersection(options.get("members") or ()) - set(vars(documented))
        assert not left_out or options.get("inherited_members"), (name, left_out)
