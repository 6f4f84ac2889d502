"""What docs/ says of the code is there."""

import re

import pytest

from igpt_jax.config import help as help_lib
from igpt_jax.pretrained import packaged
from support.paths import ROOT

PATH = re.compile(r"`((?:igpt_jax|tests|configs|launch|docs)/[\w./]*)`")
NAMED_IN = re.compile(r"`(\w+)`\s+in\s+`(igpt_jax/[\w/]+\.py)`")
LINK = re.compile(r"\]\(([^)#]+)")
PAGES = sorted((ROOT / "docs").glob("*.md"))
FRONT = [
  ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")
]


@pytest.mark.parametrize("page", [*FRONT, *PAGES], ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
  paths = set(PATH.findall(page.read_text(encoding="utf-8")))
  assert paths or page.name == "CHANGELOG.md"
  assert not [path for path in sorted(paths - {"tests/unit/ROOM"}) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_that_a_page_places_in_a_file_stands_there(page):
  for name, path in NAMED_IN.findall(page.read_text(encoding="utf-8")):
    assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_every_room_stands_in_the_tree_of_the_architecture():
  text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
  rooms = {path.parent.name for path in (ROOT / "igpt_jax").glob("*/__init__.py")}
  assert not [room for room in sorted(rooms) if f"`igpt_jax/{room}/`" not in text]
  assert len(text.splitlines()) < 150


@pytest.mark.parametrize("page", [*FRONT, *PAGES], ids=lambda page: page.name)
def test_every_link_and_image_of_a_page_is_there(page):
  targets = LINK.findall(page.read_text(encoding="utf-8"))
  local = [target for target in targets if not target.startswith("http")]
  assert not [target for target in local if not (page.parent / target).exists()]


def test_the_readme_is_short_and_leads_to_every_page():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  assert len(text.splitlines()) <= 100
  assert max(map(len, text.splitlines())) <= 120
  linked = {(ROOT / target).resolve() for target in LINK.findall(text)}
  assert linked >= {*PAGES, *FRONT[1:], ROOT / "LICENSE", ROOT / "NOTICE", ROOT / "CITATION.cff"}


def test_the_page_of_settings_is_what_the_declarations_give():
  page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
  assert page == f"{help_lib.of_all()}\n", "fix: python -m igpt_jax.config.help > docs/settings.md"


def test_files_are_small_but_for_the_packaged_model():
  """CONTRIBUTING.md has the limit: a clone carries every version of every file."""
  folders = ("igpt_jax", "configs", "launch", "docs", "tests")
  paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
  sizes = {path: path.stat().st_size for path in paths if "__pycache__" not in path.parts}
  assert len(sizes) > 300 and max(sizes.values()) > 100_000
  most = {packaged.FILE: 3_000_000}
  assert not [path for path, size in sizes.items() if size > most.get(path, 200_000)]
