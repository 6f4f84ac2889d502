"""What docs/ says of the code is there."""

import re

import pytest

from support.paths import ROOT

PATH = re.compile(r"`((?:igpt_jax|tests|configs|launch|docs)/[\w./]*)`")
NAMED_IN = re.compile(r"`(\w+)`\s+in\s+`(igpt_jax/[\w/]+\.py)`")
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
  paths = set(PATH.findall(page.read_text(encoding="utf-8")))
  assert paths and not [path for path in sorted(paths) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_that_a_page_places_in_a_file_stands_there(page):
  for name, path in NAMED_IN.findall(page.read_text(encoding="utf-8")):
    assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_every_room_stands_in_the_tree_of_the_architecture():
  text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
  rooms = {path.parent.name for path in (ROOT / "igpt_jax").glob("*/__init__.py")}
  assert not [room for room in sorted(rooms) if f"`igpt_jax/{room}/`" not in text]
  assert len(text.splitlines()) < 150
