"""Processes of Python that tests send signals to."""

import subprocess

from support.paths import ROOT

SECONDS = 60  # that a process may take to do as it is told


def started(*arguments):
  """A process of Python that has said "ready"."""
  process = subprocess.Popen(
    arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "ready\n"
  return process
