"""Reads named arrays from safetensors files and torch's old pickles.

Only file formats belong here; `huggingface` interprets the tensors. Files are untrusted: the
safetensors library checks that offsets tile the file, and torch loads with `weights_only`.
"""

import os
import stat
import struct
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from igpt_jax.errors import UserError
from igpt_jax.pretrained.leaves import WEIGHT_DTYPES, Spec, shown

_SAFETENSORS_DTYPES = dict(zip(("F32", "F16", "BF16"), WEIGHT_DTYPES, strict=True))
_MAX_HEADER_BYTES = 4 << 20  # an L-size model's has 60 kB
_MAX_FILES = 512
_MAX_NAME = 512


class _SafetensorsSource:
  """Tensors of one or more safetensors files, read with pread so that nothing stays mapped."""

  def __init__(self, directory: str):
    self._directory = directory
    self._files: dict[str, safe_open] = {}
    self.file_of: dict[str, str] = {}  # by tensor
    self.specs: dict[str, Spec] = {}
    self.metadata: dict[str, str] = {}  # of all files

  def add(self, file: str) -> None:
    path = os.path.join(self._directory, file)
    _check_header(path)
    try:
      handle = safe_open(path, framework="np", backend="pread")
      self._files[file] = handle
      self.metadata |= handle.metadata() or {}
      for name in handle.keys():
        if not name.isprintable() or len(name) > _MAX_NAME:
          raise UserError(f"weights: {path} names a tensor {shown(name)}; expected a tensor's name")
        if name in self.specs:
          raise UserError(
            f"weights: {name} is in {path} and in {self.file_of[name]}; expected one of them"
          )
        view = handle.get_slice(name)
        self.specs[name] = (tuple(view.get_shape()), _SAFETENSORS_DTYPES.get(view.get_dtype()))
        self.file_of[name] = file
    except (SafetensorError, OSError, ValueError) as error:
      raise _damaged(path, error) from error

  def read(self, name: str) -> np.ndarray:
    file = self.file_of[name]
    try:
      return self._files[file].get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
      raise _damaged(os.path.join(self._directory, file), error) from error

  def close(self) -> None:
    self._files.clear()


def _damaged(path: str, error: Exception) -> UserError:
  return UserError(
    f"weights: {path}: {str(error)[:300]}; expected a whole safetensors file; "
    "fix: copy or download it again"
  )


def is_safetensors(path: str) -> bool:
  """Returns True if a file begins as safetensors do: a length, then a header in JSON."""
  start = _start_of(path, 9)
  return start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= _MAX_HEADER_BYTES


def _start_of(path: str, size: int) -> bytes:
  """Reads a file's first bytes; raises UserError if it can't be read."""
  try:
    with open(path, "rb") as file:
      return file.read(size)
  except OSError as error:
    raise UserError(f"weights: {path}: {error.strerror}; expected a readable file") from error


def _check_header(path: str) -> None:
  """Raises UserError if the header is too large for the library's JSON parser, or missing."""
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise UserError(f"weights: {path}; expected a regular file")
  except OSError as error:
    raise UserError(f"weights: {path}: {error.strerror}; expected a readable file") from error
  start = _start_of(path, 8)
  if len(start) < 8 or struct.unpack("<Q", start)[0] > _MAX_HEADER_BYTES:
    raise UserError(
      f"weights: {path}: no header of at most 4 MiB; expected a safetensors file; "
      "fix: copy or download it again"
    )


def open_safetensors(
  directory: str, files: Sequence[str], weight_map: Mapping[str, str] | None = None
) -> _SafetensorsSource:
  """Opens files of one directory; a `weight_map` must map every tensor's name to its file.

  Raises:
    UserError: a file is missing or damaged, or the map and the files disagree.
  """
  if len(files) > _MAX_FILES:
    raise UserError(f"weights: {directory} is {len(files)} files; expected at most {_MAX_FILES}")
  source = _SafetensorsSource(directory)
  try:
    for file in files:
      source.add(file)
    if weight_map is not None:
      for name in sorted(set(weight_map) | set(source.specs)):
        listed, stored = weight_map.get(name), source.file_of.get(name)
        if listed != stored:
          raise UserError(
            f"weights: {shown(name)} of {directory} is listed in {listed}, but stored in {stored}; "
            "fix: bring the index and all files of one model together"
          )
  except BaseException:
    source.close()
    raise
  return source


class TorchSource:
  """Tensors of pytorch_model.bin, which torch opens with `weights_only`."""

  def __init__(self, path: str):
    try:
      import torch
    except ImportError as error:
      raise UserError(
        f"weights: {path} is a pickle, which only torch opens safely; fix: pip install torch, or "
        "save the model again as safetensors"
      ) from error
    if not os.path.isfile(path):
      raise UserError(f"weights: {path}; expected a regular file")
    self._torch = torch
    self._path = path
    size = os.path.getsize(path)
    try:
      try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
      except (RuntimeError, ValueError):  # files from before torch 1.6 can't be mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a damaged file can raise anything
      raise UserError(
        f"weights: {path}: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}"
        "; expected torch weights; fix: copy or download it again"
      ) from error
    if not isinstance(state, dict):
      raise UserError(f"weights: {path}; expected a dictionary of tensors")
    self._state = {}
    self.specs: dict[str, Spec] = {}
    dtypes = {getattr(torch, dtype.name): dtype for dtype in WEIGHT_DTYPES}
    declared = 0
    for name, tensor in state.items():
      if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise UserError(f"weights: {shown(name)} in {path}; expected a named tensor")
      if not name.isprintable() or len(name) > _MAX_NAME:
        raise UserError(f"weights: {path} names a tensor {shown(name)}; expected a tensor's name")
      if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UserError(f"weights: {name} in {path}; expected a dense tensor")
      # With zero strides or shared storage, a few bytes could declare tensors of any size. The
      # limit is twice the file's size, since a tied table may be listed twice.
      declared += tensor.numel() * tensor.element_size()
      if declared > 2 * size or not tensor.is_contiguous():
        raise UserError(
          f"weights: {name} in {path}; expected contiguous tensors of the file's size"
        )
      self._state[name] = tensor
      self.specs[name] = (tuple(tensor.shape), dtypes.get(tensor.dtype))

  def read(self, name: str) -> np.ndarray:
    tensor = self._state[name].detach()
    if tensor.dtype == self._torch.bfloat16:
      return tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  def close(self) -> None:
    self._state = {}
