"""Downloads the release's files: checkpoints, palette, and ImageNet and CIFAR-10 as tokens.

The files are those that openai/image-gpt's download.py names. No hashes were published: the
server's Content-MD5 is checked if it sends one, and the import checks every tensor's CRC.
Interrupted downloads resume. Only downloading belongs here.
"""

import base64
import contextlib
import hashlib
import http.client
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from igpt_jax.errors import UserError
from igpt_jax.pretrained.leaves import Report
from igpt_jax.units import data_size

BASE_URL = "https://openaipublic.blob.core.windows.net/image-gpt"
MODELS = {"s": 32, "m": 32, "l": 64}  # number of data files
STEPS = (131000, 262000, 524000, 1000000)
DATASETS = ("imagenet", "cifar10")
PALETTE = "color-clusters/kmeans_centers.npy"

_TRIES = 5
_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20

_NETWORK_ERRORS = (
  urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError
)  # fmt: skip


def checkpoint_files(model: str, step: int = 1000000, *, bert: bool = False) -> list[str]:
  """Returns the paths below BASE_URL of one checkpoint's files and its palette.

  Args:
    model: "s", "m" or "l".
    step: one of STEPS.
    bert: True for the model trained with the BERT objective, False for the autoregressive one.

  Raises:
    UserError: the checkpoint wasn't released.
  """
  if model not in MODELS:
    raise UserError(f"model: {model!r}; expected one of {', '.join(MODELS)}: XL was not released")
  if step not in STEPS:
    raise UserError(f"step: {step}; expected one of {', '.join(map(str, STEPS))}")
  prefix = f"checkpoints/igpt-{model}{'-bert' if bert else ''}/{step}/model.ckpt-{step}"
  shards = MODELS[model]
  data = [f"{prefix}.data-{shard:05d}-of-{shards:05d}" for shard in range(shards)]
  return [f"{prefix}.index", *data, PALETTE]


def dataset_files(name: str, splits: Sequence[str] = ("te",)) -> list[str]:
  """Returns the paths below BASE_URL of a data set's tokens (X) and labels (Y) at 32×32.

  Args:
    name: one of DATASETS.
    splits: any of "tr", "va", "te"; images are centre crops, made for evaluation.

  Raises:
    UserError: the data set or a split is unknown.
  """
  if name not in DATASETS:
    raise UserError(f"data set: {name!r}; expected one of {', '.join(DATASETS)}")
  for split in splits:
    if split not in ("tr", "va", "te"):
      raise UserError(f"split: {split!r}; expected one of tr, va, te")
  return [f"datasets/{name}_{split}{kind}.npy" for split in splits for kind in "XY"]


def download(
  files: Sequence[str],
  directory: str | os.PathLike[str],
  *,
  base_url: str = BASE_URL,
  report: Report | None = None,
) -> list[str]:
  """Downloads files into one directory under their base names; existing files are kept.

  A file gets its name when it is complete. After an interruption the next call resumes from
  `NAME.part`, if the server still has the same file.

  Args:
    files: paths below `base_url`.
    directory: created if missing.
    report: called with a progress line about every ten seconds and at the end of every file.

  Returns:
    The local paths, in the order of `files`.

  Raises:
    UserError: the server refuses the request, can't be reached or keeps sending damaged data, or
      the disk is full.
  """
  directory = os.fspath(directory)
  try:
    os.makedirs(directory, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"directory for downloads: {directory}: {error.strerror}; expected a place to write to"
    ) from error
  report = report or (lambda line: None)
  targets = [os.path.join(directory, os.path.basename(file)) for file in files]
  for i, (file, target) in enumerate(zip(files, targets, strict=True), 1):
    label = f"{os.path.basename(file)} ({i} of {len(files)})"
    if os.path.exists(target):
      report(f"{label} already exists")
    else:
      _fetch_whole(f"{base_url.rstrip('/')}/{file}", target, label, report)
  return targets


class _Interrupted(Exception):
  """A failure that another try may fix."""


def _fetch_whole(url: str, target: str, label: str, report: Report) -> None:
  for attempt in range(1, _TRIES + 1):
    try:
      _fetch(url, target, label, report)
      return
    except _Interrupted as error:
      if attempt == _TRIES:
        raise UserError(
          f"download: {url}: {error}, {_TRIES} times; fix: check the network and run this again; "
          "it resumes where it stopped"
        ) from error
      report(f"{label}: {error}; trying again")
      time.sleep(2 ** (attempt - 1))


def _fetch(url: str, target: str, label: str, report: Report) -> None:
  """Tries once: appends the missing bytes to `target`.part, checks it and renames it."""
  part, tag_path = target + ".part", target + ".part.etag"
  start, tag = 0, ""
  with contextlib.suppress(FileNotFoundError):
    with open(tag_path, encoding="utf-8") as file:
      tag = file.read()
    start = os.path.getsize(part) if tag else 0
  request = urllib.request.Request(url)
  if start:
    # With If-Range the server sends the whole file if it has changed, so that versions don't mix.
    request.add_header("Range", f"bytes={start}-")
    request.add_header("If-Range", tag)
  try:
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
      start, total = _agreed_range(response, start)
      if start and response.headers.get("ETag") != tag:  # the server ignores If-Range
        _remove(part, tag_path)
        raise _Interrupted("the file has changed on the server")
      free = shutil.disk_usage(os.path.dirname(part) or ".").free
      if total - start > free:
        raise UserError(
          f"download: {url} needs {data_size(total - start)} more; the disk of {part} has "
          f"{data_size(free)} free; "
          "fix: free some, or name another directory"
        )
      digest = _digest_of(part, start)
      with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        with open(tag_path, "w", encoding="utf-8") as tag_file:
          tag_file.write(response.headers.get("ETag", ""))
        _copy(response, file, digest, start, total, label, report)
      expected = response.headers.get("Content-MD5")
  except urllib.error.HTTPError as error:
    error.close()
    if error.code == 416:  # .part isn't shorter than the server's file
      _remove(part, tag_path)
      raise _Interrupted("the partial file doesn't fit the server's") from error
    if error.code in (408, 429) or error.code >= 500:
      raise _Interrupted(f"the server answers {error.code} {error.reason}") from error
    raise UserError(
      f"download: {url}: the server answers {error.code} {error.reason}; "
      "fix: the file may have moved; put it into the directory by hand"
    ) from error
  except _NETWORK_ERRORS as error:
    raise _Interrupted(f"{type(error).__name__}: {error}") from error
  except OSError as error:
    raise UserError(
      f"download: {error.filename or part}: {error.strerror}; expected a place to write to"
    ) from error
  if expected and base64.b64encode(digest.digest()).decode() != expected.strip():
    _remove(part, tag_path)
    raise _Interrupted("the download doesn't match the server's MD5")
  os.rename(part, target)
  _remove(tag_path)


def _agreed_range(response, start: int) -> tuple[int, int]:
  """Returns the first byte of the server's answer and the size of the whole file."""
  length = response.headers.get("Content-Length")
  if length is None or not length.isdigit():
    raise _Interrupted("the server doesn't say how long the file is")
  if response.status != 206:
    return 0, int(length)
  content_range = response.headers.get("Content-Range", "").strip()
  match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
  if not match or int(match[1]) != start or int(match[3]) != start + int(length):
    raise _Interrupted("the server answers with another range than requested")
  return start, int(match[3])


def _digest_of(part: str, size: int):
  digest = hashlib.md5(usedforsecurity=False)
  if size:
    with open(part, "rb") as file:
      while chunk := file.read(min(_CHUNK_BYTES, size - file.tell())):
        digest.update(chunk)
  return digest


def _copy(response, file, digest, done: int, total: int, label: str, report: Report) -> None:
  first, began, last_report = done, time.monotonic(), 0.0
  while done < total:
    chunk = response.read(min(_CHUNK_BYTES, total - done))
    if not chunk:
      raise _Interrupted(f"cut off after {done} of {total} bytes")
    file.write(chunk)
    digest.update(chunk)
    done += len(chunk)
    now = time.monotonic()
    if now - last_report > 10 or done == total:
      last_report = now
      rate = data_size((done - first) / max(now - began, 1e-9))
      report(f"{label}: {data_size(done)} of {data_size(total)}, {rate}/s")


def _remove(*paths: str) -> None:
  for path in paths:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path)
