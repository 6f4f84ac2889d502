"""Where a setting's bounds lie: `least` and `most` are allowed, `above` and `below` aren't."""

import pytest

from igpt_jax.config.declare import Declaration
from igpt_jax.errors import UserError

INCLUSIVE = Declaration(5, "a number of things", least=2, most=9)
EXCLUSIVE = Declaration(0.5, "a share", above=0, below=1)


@pytest.mark.parametrize(
  ("declared", "allowed", "refused"),
  [(INCLUSIVE, (2, 3, 8, 9), (1, 10)), (EXCLUSIVE, (1e-9, 0.5, 0.999), (0.0, 1.0, -1.0))],
)
def test_bounds_are_where_they_are_declared(declared, allowed, refused):
  for value in allowed:
    declared.check("config.x", value)
  for value in refused:
    with pytest.raises(UserError, match=rf"config\.x: {value}; expected {declared.expected()[:4]}"):
      declared.check("config.x", value)


def test_an_open_choice_may_be_out_of_bounds():
  declared = Declaration(0, "0: chosen", least=16)
  declared.check("config.x", 0)
  with pytest.raises(UserError, match=r"config\.x: 15; expected 16 or more"):
    declared.check("config.x", 15)
