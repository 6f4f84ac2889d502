"""Config files that are named in a setting."""

import pytest

from igpt_jax.config import named
from igpt_jax.errors import UserError


@pytest.mark.parametrize("text", ["def get_config(:", "x = 1", "import no_such_module", "{}"])
def test_a_file_that_makes_no_config_is_told_by_the_setting(tmp_path, text):
  path = tmp_path / "mine.py"
  path.write_text(text)
  with pytest.raises(UserError, match=r"^config\.first_contact\.configs: .*expected a config file"):
    named.settings_of(str(path), "config.first_contact.configs")
