"""The release's files, fetched: checkpoints, palette, and ImageNet and CIFAR-10 as tokens.

Which files there are is what openai/image-gpt's download.py names. No hashes were published: a
server's Content-MD5 is checked where it sends one, and every tensor has a CRC that the import
checks. Downloads go on where they stopped. Only fetching may enter here.
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

BASE_URL = "https://openaipublic.blob.core.windows.net/image-gpt"
MODELS = {"s": 32, "m": 32, "l": 64}  # number of data files
STEPS = (131000, 262000, 524000, 1000000)
DATASETS = ("imagenet", "cifar10")
PALETTE = "color-clusters/kmeans_centers.npy"

_TRIES = 5
_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20

_NETWORK_ERRORS = (
  urllib.error.URLError,
  http.client.HTTPException,
  ConnectionError,
  TimeoutError,
  ssl.SSLError,
)


def checkpoint_files(model: str, step: int = 1000000, *, bert: bool = False) -> list[str]:
  """Paths of one checkpoint's files below BASE_URL, its palette's included.

  Args:
    model: "s", "m" or "l".
    step: one of STEPS.
    bert: the model trained with the BERT objective instead of the autoregressive one.

  Raises:
    UserError: no such checkpoint was released.
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
  """Paths of a data set's tokens (X) and labels (Y) at 32×32 below BASE_URL.

  Args:
    name: one of DATASETS.
    splits: of "tr", "va", "te"; images are centre crops, made for evaluation.
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
  """Fetches files into one directory, under their last names; those already there are kept.

  A file appears under its name when it is whole. Stopped or cut off, the next call goes on from
  what `NAME.part` holds, if the server still has the same file.

  Args:
    files: paths below `base_url`.
    directory: made if need be.
    report: called with a line at least every ten seconds.

  Returns:
    The files' paths.

  Raises:
    UserError: the server refuses, can't be reached after several tries, or sends damaged data; the
      disk has no room.
  """
  directory = os.fspath(directory)
  try:
    os.makedirs(directory, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"directory for downloads: {directory}: {error.strerror}; expected a place to write to"
    ) from error
  targets = []
  for i, file in enumerate(files):
    target = os.path.join(directory, os.path.basename(file))
    said = f"{os.path.basename(file)} ({i + 1} of {len(files)})"
    if os.path.exists(target):
      if report:
        report(f"{said} is there")
    else:
      _fetch_whole(f"{base_url.rstrip('/')}/{file}", target, said, report or (lambda line: None))
    targets.append(target)
  return targets


class _Interrupted(Exception):
  """The connection failed in a way that another try may mend."""


def _fetch_whole(url: str, target: str, said: str, report: Report) -> None:
  for attempt in range(1, _TRIES + 1):
    try:
      _fetch(url, target, said, report)
      return
    except _Interrupted as error:
      if attempt == _TRIES:
        raise UserError(
          f"download: {url}: {error}, {_TRIES} times; fix: check the network and run this again, it "
          "goes on where it stopped"
        ) from error
      report(f"{said}: {error}; trying again")
      time.sleep(2 ** (attempt - 1))


def _fetch(url: str, target: str, said: str, report: Report) -> None:
  """One try: appends to `target`.part what is missing, and renames it when whole and right."""
  part, tag_path = target + ".part", target + ".part.etag"
  start, tag = 0, ""
  with contextlib.suppress(FileNotFoundError):
    with open(tag_path, encoding="utf-8") as file:
      tag = file.read()
    start = os.path.getsize(part) if tag else 0
  request = urllib.request.Request(url)
  if start:
    # If-Range: a file that changed on the server is sent whole instead of spliced.
    request.add_header("Range", f"bytes={start}-")
    request.add_header("If-Range", tag)
  try:
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
      start, total = _agreed_range(response, start)
      if start and response.headers.get("ETag") != tag:  # a server that doesn't know If-Range
        _remove(part, tag_path)
        raise _Interrupted("the file has changed on the server")
      free = shutil.disk_usage(os.path.dirname(part) or ".").free
      if total - start > free:
        raise UserError(
          f"download: {url} needs {total - start} bytes more, {part} has room for {free}; "
          "fix: free some, or name another directory"
        )
      digest = _digest_of(part, start)
      with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        with open(tag_path, "w", encoding="utf-8") as note:
          note.write(response.headers.get("ETag", ""))
        _copy(response, file, digest, start, total, said, report)
      expected = response.headers.get("Content-MD5")
  except urllib.error.HTTPError as error:
    error.close()
    if error.code == 416:  # what we hold is not a beginning of what they have
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
    raise _Interrupted("what arrived doesn't match the server's MD5")
  os.rename(part, target)
  _remove(tag_path)


def _agreed_range(response, start: int) -> tuple[int, int]:
  """Where the server's answer begins, and the whole file's size."""
  length = response.headers.get("Content-Length")
  if length is None or not length.isdigit():
    raise _Interrupted("the server doesn't say how long the file is")
  if response.status != 206:
    return 0, int(length)
  found = re.fullmatch(
    r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip()
  )
  if not found or int(found[1]) != start or int(found[3]) != start + int(length):
    raise _Interrupted("the server answers with another range than was asked for")
  return start, int(found[3])


def _digest_of(part: str, size: int):
  digest = hashlib.md5(usedforsecurity=False)
  if size:
    with open(part, "rb") as file:
      while chunk := file.read(min(_CHUNK_BYTES, size - file.tell())):
        digest.update(chunk)
  return digest


def _copy(response, file, digest, done: int, total: int, said: str, report: Report) -> None:
  first, began, told = done, time.monotonic(), 0.0
  while done < total:
    chunk = response.read(min(_CHUNK_BYTES, total - done))
    if not chunk:
      raise _Interrupted(f"cut off after {done} of {total} bytes")
    file.write(chunk)
    digest.update(chunk)
    done += len(chunk)
    now = time.monotonic()
    if now - told > 10 or done == total:
      told = now
      rate = (done - first) / max(now - began, 1e-9)
      report(f"{said}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s")


def _remove(*paths: str) -> None:
  for path in paths:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path)
