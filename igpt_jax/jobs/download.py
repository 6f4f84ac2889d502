"""Fetches the released files: a checkpoint with its palette, and images as tokens.

  python -m igpt_jax.main --config configs/openai_s_eval.py --config.job=download

Writes DIRECTORY/igpt-MODEL[-bert]-STEP/ and DIRECTORY/datasets/. Stopped or cut off, the same
command goes on where it stopped. No hashes were published: a server's Content-MD5 is checked if it
sends one, and every tensor's CRC when it is read.
"""

import os

from igpt_jax import units
from igpt_jax.config.fields import Settings
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.parallel.hosts import say
from igpt_jax.pretrained import released


def run(settings: Settings, workdir: str) -> None:
  """Fetches `download.model` and `download.data` into `download.directory`; no workdir is used."""
  del workdir
  wanted = settings.download
  if not wanted.model and not wanted.data:
    raise UserError("config.download: neither model nor data; expected at least one")
  root = os.path.expanduser(wanted.directory)
  batches = []
  if wanted.model:
    files = released.checkpoint_files(wanted.model, wanted.step, bert=wanted.bert)
    name = f"igpt-{wanted.model}{'-bert' if wanted.bert else ''}-{wanted.step}"
    batches.append((files, os.path.join(root, name)))
  if wanted.data:
    batches.append((released.dataset_files(wanted.data), os.path.join(root, "datasets")))
  if not hosts.is_main():
    return
  for files, directory in batches:
    say(f"{units.counted(len(files), 'file')} into {directory}")
    released.download(files, directory, base_url=wanted.url or released.BASE_URL, report=say)
  say(f"all there, in {root}")
