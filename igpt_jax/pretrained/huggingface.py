"""Reads and writes Hugging Face's Image GPT: a directory with config.json and safetensors.

Only the naming and layout of transformers' ImageGPTForCausalImageModeling belong here. Neither
torch nor transformers is needed, except torch to open an old pytorch_model.bin.

Differences from the released model: the start vector is row `n_vocab` of the input table (513 rows
in, 512 out), q, k and v are one [D, 3D] matrix, and there are biases. The released weights' biases
are zero. Our model has none, so a fine-tuned model's non-zero biases are refused by name: without
them the output would differ.

transformers 4.57 divides attention logits by the integer part of sqrt(head_dim), and so computes
another model than the released one for M (head_dim 128) and L (96); 5.23 doesn't.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from igpt_jax import files
from igpt_jax.errors import UserError
from igpt_jax.model.layers import NORM_EPSILON
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained import clusters as palettes
from igpt_jax.pretrained.leaves import (
  Foreign,
  Leaf,
  Part,
  Report,
  check_specs,
  foreign_tensors,
  listing,
  lookup,
  shown,
)
from igpt_jax.pretrained.weight_files import TorchSource, open_safetensors

_WTE = "transformer.wte.weight"
_HEAD = "lm_head.weight"
_BIASES = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 4, "mlp.c_proj": 1}  # × n_embd
_BIAS = re.compile(rf"^transformer\.h\.\d+\.({'|'.join(map(re.escape, _BIASES))})\.bias$")
_LAYER = re.compile(r"^transformer\.h\.(\d{1,9})\.")
# Causal masks that older versions of transformers stored.
_BUFFER = re.compile(r"^transformer\.h\.\d+\.attn\.(bias|masked_bias)$")

_SIZES = ("n_layer", "n_head", "n_embd", "n_positions")  # fields named like ours

# Our model computes the same as transformers' only with these values.
_REQUIRED = {
  "model_type": "imagegpt",
  "activation_function": "quick_gelu",
  "layer_norm_epsilon": NORM_EPSILON,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
}


def table(config: ImageGPTConfig, *, tied: bool = False) -> tuple[Leaf, ...]:
  """Returns our parameters' leaves in terms of ImageGPTForCausalImageModeling's tensors.

  Args:
    config: the model.
    tied: True if the output table is the input table's first `n_vocab` rows.
  """
  layers, width, vocab = config.n_layer, config.n_embd, config.n_vocab

  def one(path: str, name: str, *shape: int) -> Leaf:
    return Leaf(tuple(path.split("/")), shape, (Part(name, shape),))

  def stacked(path: str, name: str, *shape: int) -> Leaf:
    parts = tuple(Part(f"transformer.h.{i}.{name}.weight", shape, (i,)) for i in range(layers))
    return Leaf(("blocks", *path.split("/")), (layers, *shape), parts)

  def rows(path: str, shape: tuple[int, ...], take) -> Leaf:
    return Leaf((path,), shape, (Part(_WTE, (vocab + 1, width), (), take, None),))

  qkv = tuple(
    Part(
      f"transformer.h.{i}.attn.c_attn.weight",
      (width, 3 * width),
      (i,),
      to_ours=lambda w: w.reshape(width, 3, width).transpose(1, 0, 2),
      to_theirs=lambda w: w.transpose(1, 0, 2).reshape(width, 3 * width),
    )
    for i in range(layers)
  )
  return (
    rows("wte", (vocab, width), lambda w: w[:-1]),
    rows("sos", (width,), lambda w: w[-1]),
    one("wpe", "transformer.wpe.weight", config.n_positions, width),
    rows("wtet", (vocab, width), lambda w: w[:-1]) if tied else one("wtet", _HEAD, vocab, width),
    one("ln_f/g", "transformer.ln_f.weight", width),
    stacked("ln_1/g", "ln_1", width),
    Leaf(("blocks", "attn", "qkv"), (layers, 3, width, width), qkv),
    stacked("attn/proj", "attn.c_proj", width, width),
    stacked("ln_2/g", "ln_2", width),
    stacked("mlp/fc", "mlp.c_fc", width, 4 * width),
    stacked("mlp/proj", "mlp.c_proj", 4 * width, width),
  )


def open_directory(directory: str | os.PathLike[str]) -> Foreign:
  """Opens a model directory and checks its configuration and every tensor's name and shape.

  The weights are model.safetensors, else the files of model.safetensors.index.json, else
  pytorch_model.bin, which torch opens with `weights_only`.

  Raises:
    UserError: files are damaged, or the configuration or the tensors aren't our Image GPT's.
  """
  directory = os.fspath(directory)
  fields, config = read_config(directory)
  source = _open_weights(directory)
  try:
    # Check the depth first: the table is as long as config.json claims, however large that is.
    depth = len({match[1] for match in map(_LAYER.match, source.specs) if match})
    if depth != config.n_layer:
      raise UserError(
        f"weights: {directory} has {depth} layers; expected n_layer {config.n_layer} of config.json"
      )
    tied = _is_tied(fields, source, config, directory)
    leaves = table(config, tied=tied)
    check_specs(leaves, source.specs, directory)
    notes = list(_check_extra(leaves, source, directory))
    if tied:
      notes.append(
        "the output table is the input table's (tie_word_embeddings): copied, now untied"
      )
    clusters, palette_path = palettes.find_clusters(directory, config.n_vocab)
    if clusters is not None:
      notes.append(f"palette from {palette_path}")
  except BaseException:
    source.close()
    raise
  return Foreign("huggingface", directory, config, leaves, source, clusters, tuple(notes))


def read_config(directory: str) -> tuple[dict[str, Any], ImageGPTConfig]:
  """Reads a directory's config.json: its fields, and the model that they describe.

  Raises:
    UserError: it is damaged, or of another model than our Image GPT.
  """
  path = os.path.join(directory, "config.json")
  fields = palettes.read_json(path)
  return fields, _model_config(fields, path)


def _model_config(fields: Mapping[str, Any], path: str) -> ImageGPTConfig:
  for name, required in _REQUIRED.items():
    # Fields that an old or trimmed config.json omits have transformers' defaults: those required.
    if fields.get(name, required) != required:
      raise UserError(f"config.json: {name} {shown(fields[name])} in {path}; expected {required!r}")
  numbers: dict[str, Any] = {}
  for name in (*_SIZES, "vocab_size"):
    value = fields.get(name)
    limit = 1 << (24 if name in ("n_positions", "vocab_size") else 16)
    if type(value) is not int or not 1 <= value <= limit:
      raise UserError(f"config.json: {name} {shown(value)} in {path}; expected 1 to {limit}")
    numbers[name] = value
  inner = fields.get("n_inner")
  if inner not in (None, 4 * numbers["n_embd"]):
    raise UserError(f"config.json: n_inner {shown(inner)} in {path}; expected 4 × n_embd")
  if numbers["vocab_size"] < 2:
    raise UserError(f"config.json: vocab_size 1 in {path}; expected the palette's size + 1")
  return ImageGPTConfig(n_vocab=numbers.pop("vocab_size") - 1, causal=True, **numbers)


def _open_weights(directory: str):
  names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
  whole_path, index_path, torch_path = (os.path.join(directory, name) for name in names)
  if os.path.exists(whole_path):
    return open_safetensors(directory, ["model.safetensors"])
  if os.path.exists(index_path):
    weight_map = palettes.read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise UserError(f"weights: {index_path} has no weight_map; expected tensor names and files")
    for name in weight_map.values():
      if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", name):
        raise UserError(
          f"weights: {shown(name)} in {index_path}; expected a .safetensors file's bare name"
        )
    return open_safetensors(directory, sorted(set(weight_map.values())), weight_map)
  if os.path.exists(torch_path):
    return TorchSource(torch_path)
  raise UserError(
    f"weights: {directory} has neither model.safetensors nor model.safetensors.index.json nor "
    "pytorch_model.bin; fix: download the model's weights too"
  )


def _is_tied(fields: Mapping[str, Any], source, config: ImageGPTConfig, directory: str) -> bool:
  """True if the output and input tables are tied; raises UserError if config.json is wrong."""
  if not fields.get("tie_word_embeddings", False):
    if _HEAD not in source.specs and _WTE in source.specs:
      raise UserError(
        f"weights: {directory} has no {_HEAD}, and its embeddings aren't tied; fix: save the "
        "generative model (ImageGPTForCausalImageModeling), not its body or a classifier"
      )
    return False
  if _HEAD in source.specs and _WTE in source.specs:
    shape, embedding = source.specs[_HEAD][0], source.specs[_WTE][0]
    rows = config.n_vocab
    if shape[1:] != embedding[1:] or not np.array_equal(
      source.read(_HEAD)[:rows], source.read(_WTE)[:rows]
    ):
      raise UserError(
        f"weights: {directory}: {_HEAD} differs from {_WTE}, but config.json says they are tied; "
        "fix: set tie_word_embeddings to what was trained"
      )
  return True


def _check_extra(leaves: tuple[Leaf, ...], source, directory: str) -> Iterator[str]:
  """Yields notes on skipped tensors; raises UserError for those that change the output."""
  used = {part.name for leaf in leaves for part in leaf.parts} | {_HEAD}
  extra = [name for name in source.specs if name not in used]
  biases = [name for name in extra if _BIAS.match(name)]
  nonzero = [name for name in biases if np.any(source.read(name))]
  if nonzero:
    raise UserError(
      f"biases: {listing(nonzero)} in {directory} aren't zero; expected a model without biases, as "
      "the released ones are; fix: a model fine-tuned with biases can't be converted"
    )
  skipped = [name for name in extra if name not in biases and not _BUFFER.match(name)]
  unknown = [name for name in skipped if name.startswith("transformer.")]
  if unknown:
    raise UserError(
      f"weights: {listing(unknown)} in {directory}; expected only an Image GPT's tensors"
    )
  if skipped:
    yield f"left out, not weights of the generative model: {listing(skipped)}"


def write_directory(
  directory: str | os.PathLike[str],
  config: ImageGPTConfig,
  params: Mapping[str, Any],
  *,
  clusters: np.ndarray | None = None,
  max_shard_bytes: int = 2_000_000_000,
  fetch: Callable[[Any], np.ndarray] = np.asarray,
  report: Report | None = None,
) -> None:
  """Writes, all or nothing, a directory that ImageGPTForCausalImageModeling.from_pretrained loads.

  Args:
    directory: the target; must not exist.
    config, params: our model and its parameters.
    clusters: palette, float32 [n_vocab, 3] in [-1, 1], for preprocessor_config.json.
    max_shard_bytes: size limit of one file; a larger model gets several files and an index. About
      one file and one leaf are in memory beside `params`.
    fetch, report: as for `leaves.foreign_tensors`.

  Raises:
    UserError: the target exists, the model is BERT, or `params` don't fit `config`.
  """
  directory = os.fspath(directory).rstrip("/")
  if not config.causal:
    raise UserError(
      "format: huggingface; expected an autoregressive model, since transformers' Image GPT always "
      "masks the future; fix: write a BERT model as format openai"
    )
  leaves = table(config)
  sizes = dict(_planned(leaves, config, params))
  shards = _plan_shards(sizes, max_shard_bytes)
  with files.new_folder(directory, "directory to write") as part:
    tensors = _their_tensors(leaves, config, params, fetch, report)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
      number = f"-{i:05d}-of-{len(shards):05d}" if shards[1:] else ""
      file = f"model{number}.safetensors"
      batch = dict(next(tensors) for _ in shard)
      path = os.path.join(part, file)
      save_file(batch, path, metadata={"format": "pt"})
      files.allow_as_usual(path)
      weight_map |= dict.fromkeys(batch, file)
      del batch
    if shards[1:]:
      index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
      _write_json(os.path.join(part, "model.safetensors.index.json"), index)
    dtype = np.dtype(lookup(params, leaves[0]).dtype).name
    _write_json(os.path.join(part, "config.json"), _config_fields(config, dtype))
    if clusters is not None:
      fields = _preprocessor_fields(config, np.asarray(clusters))
      _write_json(os.path.join(part, palettes.JSON_NAME), fields)


def _planned(leaves, config: ImageGPTConfig, params) -> Iterator[tuple[str, int]]:
  """Yields (name, bytes) of `_their_tensors`' tensors in the same order, without reading them."""
  for leaf in leaves:
    itemsize = np.dtype(lookup(params, leaf).dtype).itemsize
    for part in leaf.parts:
      if part.to_theirs is not None:
        yield part.name, math.prod(part.shape) * itemsize
  itemsize = np.dtype(lookup(params, leaves[0]).dtype).itemsize
  yield _WTE, (config.n_vocab + 1) * config.n_embd * itemsize
  for name, size in _zero_biases(config):
    yield name, size * itemsize


def _their_tensors(leaves, config, params, fetch, report) -> Iterator[tuple[str, np.ndarray]]:
  yield from foreign_tensors(leaves, params, fetch=fetch, report=report)
  wte, sos = (np.asarray(fetch(lookup(params, leaf))) for leaf in leaves[:2])
  yield _WTE, np.concatenate([wte, sos[None]])
  for name, size in _zero_biases(config):
    yield name, np.zeros(size, wte.dtype)


def _zero_biases(config: ImageGPTConfig) -> Iterator[tuple[str, int]]:
  for i in range(config.n_layer):
    for name, times in _BIASES.items():
      yield f"transformer.h.{i}.{name}.bias", times * config.n_embd


def _plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
  shards: list[list[str]] = [[]]
  used = 0
  for name, size in sizes.items():
    if shards[-1] and used + size > max_bytes:
      shards.append([])
      used = 0
    shards[-1].append(name)
    used += size
  return shards


def _config_fields(config: ImageGPTConfig, dtype: str) -> dict[str, Any]:
  return {
    "architectures": ["ImageGPTForCausalImageModeling"],
    **_REQUIRED,
    **{name: getattr(config, name) for name in _SIZES},
    "dtype": dtype,
    "n_inner": None,
    "vocab_size": config.n_vocab + 1,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": False,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "use_cache": True,
  }


def _preprocessor_fields(config: ImageGPTConfig, clusters: np.ndarray) -> dict[str, Any]:
  if clusters.shape != (config.n_vocab, 3):
    raise UserError(f"palette: shape {list(clusters.shape)}; expected [{config.n_vocab}, 3]")
  fields = {
    "image_processor_type": "ImageGPTImageProcessor",
    "clusters": clusters.astype(np.float64).tolist(),
    "do_color_quantize": True,
    "do_normalize": True,
    "do_resize": True,
    "resample": 2,
  }
  side = math.isqrt(config.n_positions)
  if side * side == config.n_positions:
    fields["size"] = {"height": side, "width": side}
  return fields


def _write_json(path: str, value: dict[str, Any]) -> None:
  with open(path, "w", encoding="utf-8") as file:
    json.dump(value, file, indent=2, sort_keys=True)
    file.write("\n")
