"""The pages hang together: all are in the menu, links lead somewhere, names of the API exist, pictures are current."""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from docs.fences import PAGES, ROOT, name_of, spans

LINK = re.compile(r"\]\(([^)\s]+)\)")
OTHERS = {"execution-speed.json"}
"""Files beside the pages that no page shows."""


def entries(nav: list[Any]) -> Iterator[str]:
    """Pages of a menu, in order."""
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from entries(value) if isinstance(value, list) else [value]


def anchors(text: str) -> set[str]:
    """The names by which headings of a page can be linked to."""
    found = set()
    for heading in re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text)):
        bare = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        found.add(re.sub(r"[\s-]+", "-", bare))
    return found


def test_every_page_is_in_the_menu_once():
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.parent != ROOT}
    assert sorted(nav) == sorted(set(nav))
    assert set(nav) == pages, "mkdocs.yml names every page under docs/, and none that is not there"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor and file.suffix == ".md":
            there = anchors(file.read_text())
            assert anchor in there, f"{name_of(page)} links to {target}; headings: {sorted(there)}"


def test_files_that_are_named_are_there():
    """`planning/ranks.py` in a sentence is a file of the package or of the repository."""
    seen = 0
    for page in PAGES:
        for number, span in spans(page):
            if re.fullmatch(r"[\w./-]+/[\w-]+\.(py|toml|txt)", span) and not span.startswith(("out/", "/", "model/")):
                places = (ROOT / span, ROOT / "src" / "equipoise" / span, page.parent / span)
                assert any(place.exists() for place in places), f"{name_of(page)}:{number}: there is no {span}"
                seen += 1
    assert seen > 20


def test_what_the_api_pages_name_exists_and_says_what_it_is():
    named = [name for page in PAGES for name in re.findall(r"(?m)^::: ([\w.]+)$", page.read_text())]
    assert len(named) > 40
    for name in named:
        try:
            value: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            value = getattr(importlib.import_module(module), attribute)
        assert value.__doc__, f"{name} has no docstring"


def test_all_public_names_are_in_the_reference():
    import equipoise

    text = (ROOT / "docs" / "api" / "index.md").read_text()
    values = {"Evaluation", "Plan", "Profile", "EquipoiseError", "__version__"}
    """The three values and the error have pages of their own."""
    for name in set(equipoise.__all__) - values:
        assert f"heading: equipoise.{name}," in text, f"docs/api/index.md does not have equipoise.{name}"


def test_pictures_are_those_that_the_library_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))["PICTURES"]
    for name, draw in drawn.items():
        assert (ROOT / "docs" / "pictures" / name).read_text() == draw(), f"run docs/pictures/draw.py: {name} is out of date"
        assert any(f"pictures/{name}" in page.read_text() for page in PAGES), f"no page shows {name}"
