"""Models of the Hugging Face hub, named OWNER/NAME or OWNER/NAME@REVISION, as folders of this machine.

huggingface_hub's own client fetches them into its cache, so HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE have their usual meaning, and what is there isn't fetched again. The client compares sizes
alone; here every file is compared with the checksum that the hub knows it by. Only fetching belongs here:
`huggingface` reads the folder.
"""

import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from igpt_jax import extras, files, watchdog
from igpt_jax.data import digests
from igpt_jax.errors import UserError
from igpt_jax.parallel import hosts
from igpt_jax.pretrained import clusters, huggingface
from igpt_jax.pretrained.leaves import Report

_NAME = re.compile(r"([a-z0-9][\w.-]*/[a-z0-9][\w.-]*)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.A | re.I)
_SUM = re.compile(
  "[0-9a-f]{40}|[0-9a-f]{64}"
)  # git's digest of a small file, SHA-256 of a large one
_DESCRIPTIONS = ["config.json", clusters.JSON_NAME]
_SAFETENSORS = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLE = "pytorch_model.bin"
_DOING = "fetching from the Hugging Face hub"
_REST = (
  "if fetching was cut off, the same command with a network, without HF_HUB_OFFLINE, gets the rest"
)
_OWN_FOLDERS = ("runs", "downloads", "checkpoints")  # as this project's commands and docs name them
_ELSEWHERE = "OpenAI's own files come with --config.job=download"


class Snapshot(NamedTuple):
  """Folder of a model's files, and the 40 hexadecimal digits of the commit that they are of."""

  folder: str
  commit: str


def is_name(path: str) -> bool:
  """Returns True if a path names a model of the hub: nothing is there, nor a folder OWNER.

  With @REVISION it does unless that very path exists; without, OWNER isn't a folder of this project's
  commands, such as runs/, which may be missing.
  """
  match = _NAME.fullmatch(path)
  if match is None or ".." in path or "--" in path or os.path.lexists(path):
    return False
  owner = os.path.dirname(path)
  return match[2] is not None or not (owner in _OWN_FOLDERS or os.path.isdir(owner))


def is_snapshot(path: str, name: str) -> bool:
  """Returns True if a path is that of files that `fetch` got for this name.

  A branch or a tag may have moved since: any commit is its.
  """
  match, snapshot = _NAME.fullmatch(name), files.hub_snapshot(path)
  if match is None or snapshot is None or snapshot[0].lower() != match[1].lower():
    return False
  is_commit = match[2] is not None and re.fullmatch("[0-9a-f]{7,40}", match[2])
  return not is_commit or snapshot[1].startswith(match[2])


def fetch(name: str, report: Report) -> Snapshot:
  """Returns a model's files, fetched unless they are in the client's cache. Collective.

  The main process goes first, and the others take the commit that it got: hosts with one cache
  download once, others each for themselves.

  Raises:
    UserError: huggingface_hub isn't installed, the model isn't there, is none of ours or can't be
      reached, or a file is damaged.
  """
  watchdog.beat(_DOING)
  if jax.process_count() == 1:
    return _fetch(name, report)
  snapshot, error, commit = None, None, np.zeros(20, np.uint8)
  if hosts.is_main():
    try:
      snapshot = _fetch(name, report)
      commit = np.frombuffer(bytes.fromhex(snapshot.commit), np.uint8)
    except UserError as caught:
      error = caught
  commit = bytes(
    np.asarray(hosts.array_from_main(commit, f"the first host to fetch {name}"), np.uint8)
  ).hex()
  if not int(commit, 16):
    raise error or UserError(
      f"checkpoint: {name}: the main process couldn't fetch it; fix: see what that one says"
    )
  return snapshot or _fetch(f"{name.partition('@')[0]}@{commit}", report)


def _fetch(name: str, report: Report) -> Snapshot:
  match = _NAME.fullmatch(name)
  assert match is not None, "the caller has asked `is_name`"
  get = _getter(name, match[1])
  folder = get(match[2], _DESCRIPTIONS)
  if not os.path.exists(os.path.join(folder, "config.json")):
    raise UserError(
      f"checkpoint: {name} has no config.json; expected an Image GPT of transformers; fix: {_REST}"
    )
  _check_contents(name, folder)
  huggingface.read_config(folder)  # another model is refused before its weights are fetched
  commit = os.path.basename(folder)
  get(commit, _SAFETENSORS)
  if not glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")):
    if importlib.util.find_spec("torch") is None:
      raise UserError(
        f"checkpoint: {name} has no safetensors, and a {_PICKLE} is a pickle, which only torch opens "
        f"safely; fix: pip install torch; or @REVISION with safetensors; or {_ELSEWHERE}; "
        f"{_REST}"
      )
    get(commit, [_PICKLE])
  if lacking := _lacking(folder):
    raise UserError(
      f"checkpoint: {name}: {folder} lacks {lacking}; expected all weights; fix: {_REST}; {_ELSEWHERE}"
    )
  _check_contents(name, folder)
  report(f"{match[1]} of the Hugging Face hub: commit {commit}, in {folder}")
  return Snapshot(folder, commit)


def _lacking(folder: str) -> str:
  """Returns a file of weights that a snapshot lacks; "" if it is whole."""
  index = os.path.join(folder, "model.safetensors.index.json")
  names = set()
  if os.path.exists(index):
    try:
      names = set(files.read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      return ""  # whoever reads it says what is wrong
  lacking = [name for name in names if not os.path.exists(os.path.join(folder, str(name)))]
  if names or glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")):
    return str(min(lacking, default=""))
  return "" if os.path.exists(os.path.join(folder, _PICKLE)) else "model.safetensors"


def _getter(name: str, repo: str) -> Callable[[str | None, list[str]], str]:
  """Returns a function of a revision and patterns that fetches these files; it returns their folder."""
  try:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, tqdm
  except ImportError:
    raise UserError(
      f"checkpoint: {name}: nothing is there, and to fetch it from the Hugging Face hub needs "
      f"huggingface_hub; fix: {extras.install('hub')}, or a local path"
    ) from None
  if not hosts.is_main():
    disable_progress_bars()

  class Bar(tqdm):
    """The client's progress bar, whose progress is the process's."""

    def update(self, n: float | None = 1) -> bool | None:
      watchdog.beat(_DOING)
      return super().update(n)

  def get(revision: str | None, patterns: list[str]) -> str:
    try:
      return str(
        huggingface_hub.snapshot_download(
          repo, revision=revision, allow_patterns=patterns, tqdm_class=Bar
        )
      )
    except Exception as error:  # versions use different network libraries, with their own errors
      raise _in_words(name, error) from error

  return get


def _in_words(name: str, error: Exception) -> UserError:
  from huggingface_hub import constants, errors

  where = f"checkpoint: {name}: nothing is there, and {constants.ENDPOINT}"
  cause = error.__cause__ or error
  first = next(iter(str(cause).splitlines()), "")[:200] or type(cause).__name__
  if isinstance(error, errors.GatedRepoError):
    return UserError(
      f"{where} gives it only to those who accepted its conditions; fix: do so there, and set HF_TOKEN"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return UserError(
      f"{where} has no such revision; expected a branch, a tag or a commit; fix: OWNER/NAME@REVISION"
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return UserError(
      f"{where} has no such model, or a private one; expected a local path, or a name such as "
      "openai/imagegpt-small; fix: the name, or HF_TOKEN for a private one"
    )
  if constants.HF_HUB_OFFLINE:
    return UserError(
      f"{where} isn't asked, as HF_HUB_OFFLINE is set; the cache {constants.HF_HUB_CACHE} hasn't all "
      f"of it; fix: fetch it once without, or copy that folder from where it is; {_ELSEWHERE}"
    )
  if isinstance(error, OSError) and error.strerror:
    place = error.filename or constants.HF_HUB_CACHE
    return UserError(
      f"checkpoint: {name}: {place}: {error.strerror}; expected a place to write to; fix: HF_HOME=DIR"
    )
  if isinstance(cause, errors.HfHubHTTPError):
    return UserError(f"{where} answers: {first}; fix: try again later; {_ELSEWHERE}")
  return UserError(
    f"{where} can't be reached ({type(cause).__name__}: {first}); fix: a network; or on a machine "
    f"that has one `hf download {name.partition('@')[0]}`, and copy its {constants.HF_HUB_CACHE} to "
    f"this one's, or the files into a folder; {_ELSEWHERE}"
  )


def _check_contents(name: str, folder: str) -> None:
  """Compares each file with its checksum, by which the cache names what the snapshot links to.

  A file that differs is removed, so that the next start fetches it anew.

  Raises:
    UserError: a file differs.
  """
  links = filter(os.path.islink, (os.path.join(folder, file) for file in os.listdir(folder)))
  # The link alone: what it points to may itself be one, to a store with other names.
  expected = {path: os.path.basename(os.readlink(path)) for path in sorted(links)}
  # Another server than the hub's own may name files otherwise.
  expected = {path: sum for path, sum in expected.items() if _SUM.fullmatch(sum)}
  large = [path for path, sum in expected.items() if len(sum) == 64]
  sums = dict(zip(large, digests.of_files(large, kept_as=folder), strict=True))
  for path in expected.keys() - sums.keys():
    sums[path] = _git_digest(path)
  for path, sum in expected.items():
    if sums[path] == digests.UNREADABLE:
      raise UserError(f"checkpoint: {name}: {path} can't be read; expected a file; fix: try again")
    if not sum.startswith(sums[path]):
      what = f"checkpoint: {name}: {path} isn't what the hub says by its checksum {sum[:16]}"
      try:
        for damaged in (os.path.join(folder, os.readlink(path)), path):
          os.remove(damaged)
      except OSError as error:
        raise UserError(f"{what}; {error.strerror}; fix: remove it and what it links to") from error
      raise UserError(f"{what}: removed; fix: the same command fetches it again")


def _git_digest(path: str) -> str:
  """Returns the 40 hexadecimal digits by which git knows a small file; UNREADABLE if it can't be read."""
  try:
    with open(path, "rb") as file:
      content = file.read()
  except OSError:
    return digests.UNREADABLE
  header = f"blob {len(content)}\0".encode()
  return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
