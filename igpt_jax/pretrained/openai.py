"""Reads and writes OpenAI's checkpoints: the variables of openai/image-gpt's src/model.py.

Only the naming and layout of those variables belong here; `tensor_bundle` handles the files.
Autoregressive checkpoints have `model/sos`, BERT ones don't. There are no biases anywhere. A q, k
or v projection is stored as [head, head_dim, D] and contracted over its last axis.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from igpt_jax.errors import UserError
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained.leaves import (
  Foreign,
  Leaf,
  Part,
  Report,
  check_specs,
  foreign_tensors,
  listing,
)
from igpt_jax.pretrained.tensor_bundle import Bundle, write_bundle

# TensorFlow's names of Adam's moments, and the classification head of src/model.py. src/run.py
# doesn't save the head, but other programs may.
_KNOWN_EXTRA = re.compile(r"(^|/)(clf/.*|.*/(Adam|Adam_1|ExponentialMovingAverage|Momentum))$")
_LAYER = re.compile(r"^model/h(0|[1-9]\d{0,8})/")


def _reshape(*shape: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda w: w.reshape(shape)


def table(config: ImageGPTConfig) -> tuple[Leaf, ...]:
  """Returns our parameters' leaves in terms of the checkpoint's variables."""
  layers, width = config.n_layer, config.n_embd
  square = (width, width)
  per_head = (config.n_head, config.head_dim, width)

  def whole(path: str, *shape: int) -> Leaf:
    return Leaf(tuple(path.split("/")), shape, (Part(f"model/{path}", shape),))

  def stacked(path: str, name: str, *shape: int) -> Leaf:
    parts = tuple(Part(f"model/h{i}/{name}", shape, (i,)) for i in range(layers))
    return Leaf(("blocks", *path.split("/")), (layers, *shape), parts)

  qkv = tuple(
    Part(
      f"model/h{i}/attn/{name}_proj",
      per_head,
      (i, j),
      to_ours=lambda w: w.reshape(square).T,
      to_theirs=lambda w: w.T.reshape(per_head),
    )
    for i in range(layers)
    for j, name in enumerate("qkv")
  )
  proj = tuple(
    Part(f"model/h{i}/attn/c_proj", per_head, (i,), _reshape(*square), _reshape(*per_head))
    for i in range(layers)
  )
  leaves = [
    whole("wte", config.n_vocab, width),
    whole("wpe", config.n_positions, width),
    whole("wtet", config.n_vocab, width),
    whole("ln_f/g", width),
    stacked("ln_1/g", "ln_1/g", width),
    Leaf(("blocks", "attn", "qkv"), (layers, 3, *square), qkv),
    Leaf(("blocks", "attn", "proj"), (layers, *square), proj),
    stacked("ln_2/g", "ln_2/g", width),
    stacked("mlp/fc", "mlp/c_fc/w", width, 4 * width),
    stacked("mlp/proj", "mlp/c_proj/w", 4 * width, width),
  ]
  if config.causal:
    leaves.append(whole("sos", width))
  return tuple(leaves)


def open_checkpoint(prefix: str | os.PathLike[str]) -> Foreign:
  """Opens `PREFIX.index` and its data files, and checks every name and shape.

  Raises:
    UserError: files are damaged, or variables, listed by name, aren't an Image GPT's.
  """
  prefix = os.fspath(prefix)
  bundle = Bundle(prefix)
  try:
    config = _infer_config(bundle.specs, prefix)
    leaves = table(config)
    check_specs(leaves, bundle.specs, prefix)
    notes = _check_extra(leaves, bundle.specs, prefix)
  except BaseException:
    bundle.close()
    raise
  return Foreign("openai", prefix, config, leaves, bundle, notes=notes)


def _infer_config(specs: Mapping[str, Any], prefix: str) -> ImageGPTConfig:
  """Infers the model from a few variables' shapes; `check_specs` then checks all of them."""
  shapes = {}
  for name, rank in (("wte", 2), ("wpe", 2), ("h0/attn/q_proj", 3)):
    shape = specs.get(f"model/{name}", ((), None))[0]
    if len(shape) != rank or 0 in shape:
      actual = list(shape) if f"model/{name}" in specs else "nothing"
      raise UserError(
        f"checkpoint variable: model/{name} in {prefix}: {actual}; expected an array of {rank} "
        "dimensions; fix: this isn't an Image GPT of openai/image-gpt"
      )
    shapes[name] = shape
  n_head, head_dim, n_embd = shapes["h0/attn/q_proj"]
  if n_head * head_dim != n_embd or n_embd != shapes["wte"][1]:
    raise UserError(
      f"checkpoint variables: {prefix}: model/h0/attn/q_proj {list(shapes['h0/attn/q_proj'])} and "
      f"model/wte {list(shapes['wte'])}; expected [n_head, n_embd / n_head, n_embd] and "
      "[n_vocab, n_embd]"
    )
  layers = {int(match[1]) for match in map(_LAYER.match, specs) if match}
  missing = next(i for i in range(len(layers) + 1) if i not in layers)
  if missing != len(layers):
    raise UserError(
      f"checkpoint variables: {prefix} has none of model/h{missing}; expected it before later layers"
    )
  return ImageGPTConfig(
    n_layer=len(layers),
    n_head=n_head,
    n_embd=n_embd,
    n_vocab=shapes["wte"][0],
    n_positions=shapes["wpe"][0],
    causal="model/sos" in specs,
  )


def _check_extra(leaves: tuple[Leaf, ...], specs: Mapping[str, Any], prefix: str):
  """Returns notes on skipped variables; raises UserError for those that change the output."""
  used = {part.name for leaf in leaves for part in leaf.parts}
  extra = [name for name in specs if name not in used]
  unknown = [name for name in extra if name.startswith("model/") and not _KNOWN_EXTRA.search(name)]
  if unknown:
    raise UserError(
      f"checkpoint variables: {listing(unknown)} in {prefix}; expected only those of "
      "openai/image-gpt's model: ignoring others would change the output"
    )
  if extra:
    return (f"left out, not weights of the generative model: {listing(extra)}",)
  return ()


def write_checkpoint(
  prefix: str | os.PathLike[str],
  config: ImageGPTConfig,
  params: Mapping[str, Any],
  *,
  num_shards: int = 1,
  fetch: Callable[[Any], np.ndarray] = np.asarray,
  report: Report | None = None,
) -> None:
  """Writes `PREFIX.index` and data files that openai/image-gpt's src/run.py restores.

  Args:
    prefix: for example `out/model.ckpt-1000000`; its files must not exist.
    config, params: our model and its parameters.
    num_shards: number of data files.
    fetch, report: as for `leaves.foreign_tensors`.
  """
  tensors = foreign_tensors(table(config), params, fetch=fetch, report=report)
  write_bundle(prefix, tensors, num_shards=num_shards)
