"""Text without what tells whose machine it is from, for reports that are sent to strangers."""

import getpass
import os
import re
import socket

_PLACE = "<path>"
# Paths of two parts or more, Windows' too; a library's own follows from its folder on. Numbers with slashes are none.
_IN_LIBRARY = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s'\":;,()]*(?:site|dist)-packages[/\\]")
_PATH = re.compile(r"(?<![\w./<>)])(?:~|[A-Za-z]:)?(?:[/\\][^\s'\":;,()/\\]+){1,}[/\\]?|~[/\\]\S*")
_ADDRESSES = (
  re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\")>]+"),
  re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b"),
  re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b"),
  re.compile(r"\b[\w-]+(?:\.[\w-]+)*\.(?:internal|local|lan)\b(?::\d+)?"),
  re.compile(
    r"(?<![\w:])(?:(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|[0-9a-f:]*::[0-9a-f:]+)", re.IGNORECASE
  ),
)
# Variables that name other hosts of a run.
_HOSTS = ("TPU_WORKER_HOSTNAMES", "HOSTNAME", "JAX_COORDINATOR_ADDRESS", "SLURMD_NODENAME")


def scrubbed(text: str) -> str:
  """Returns text with paths, addresses, and names of hosts and of the user replaced by "<…>"."""
  text = _IN_LIBRARY.sub("", text)
  for folder in (os.getcwd(), os.path.expanduser("~")):  # with spaces in them, maybe
    if len(folder) > 1:
      text = re.sub(rf"{re.escape(folder)}[^\s'\":;,()]*", _PLACE, text)
  for address in _ADDRESSES:
    text = address.sub("<address>", text)
  text = _PATH.sub(_PLACE, text)
  for name in sorted(_names(), key=len, reverse=True):
    text = re.sub(rf"(?<![\w]){re.escape(name)}(?![\w])", "<name>", text, flags=re.IGNORECASE)
  return text


def _names() -> set[str]:
  """Returns the names of this host, of a run's other hosts as far as they are known, and of the user."""
  host = socket.gethostname()
  names = {host, host.partition(".")[0], os.path.basename(os.path.expanduser("~"))}
  names.update(part for name in _HOSTS for part in re.split(r"[,:]", os.environ.get(name, "")))
  try:
    names.add(getpass.getuser())
  except (KeyError, OSError):  # a user id without a name, as in containers
    pass
  # "root" and "localhost" are everybody's; a number is no name.
  return {name for name in names if len(name) > 1 and not name.isdigit()} - {"root", "localhost"}
