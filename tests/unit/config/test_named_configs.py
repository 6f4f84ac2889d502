"""Config files that are named in a setting."""

import pytest

from igpt_jax.config import base, named
from igpt_jax.config.fields import from_config
from igpt_jax.config.read import settings_of
from igpt_jax.errors import UserError


@pytest.mark.parametrize("text", ["def get_config(:", "x = 1", "import no_such_module", "{}"])
def test_a_file_that_makes_no_config_is_told_by_the_setting(tmp_path, text):
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(UserError, match=r"^config\.first_contact\.configs: .*expected a config file"):
    named.settings_of(str(path), "config.first_contact.configs")


def test_what_is_named_is_checked_with_what_replaces_in_it(tmp_path):
  """Before anything is measured: settings that don't agree are told as those of any job."""
  path = tmp_path / "mine.py"
  path.write_text("from igpt_jax.config import base\nget_config = base\n")
  config = base()
  config.job = "first_contact"
  config.first_contact.configs = (str(path),)
  assert named.replaced(settings_of(config)) == {}
  config.model.n_embd, config.model.n_head = 128, 3
  assert named.replaced(from_config(config)) == {"model.n_embd": 128, "model.n_head": 3}
  with pytest.raises(UserError, match=r"model\.n_embd: 128 isn't divisible by model\.n_head: 3"):
    settings_of(config)
