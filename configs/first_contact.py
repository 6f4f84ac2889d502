"""A report on a machine that nobody has measured yet: what the project's models do there, in 10 minutes.

  bash launch/first_contact.sh

or configs/first_contact.py with any launcher of launch/. Hardware: whatever is there. Data: none.
Expect: first_contact.md and first_contact.json in the workdir, which name no host, user or path.
"""

from igpt_jax.config import base


def get_config():
  config = base()
  config.job = "first_contact"
  config.benchmark.samples = 32
  return config
