"""Hugging Face's directories: what ours doesn't compute or doesn't fit is named."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.pretrained import formats, huggingface
from support.checkpoint_cases import (
  BERT,
  CONFIG,
  assert_same,
  edit_json,
  edit_tensors,
  random_params,
  write_huggingface,
)


@pytest.fixture
def directory(tmp_path):
  return write_huggingface(tmp_path)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"activation_function": "gelu_new"}, "activation_function gelu_new"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
    ({"scale_attn_weights": False}, "scale_attn_weights False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ({"model_type": "gpt2"}, "model_type gpt2"),
    ({"n_inner": 128}, "n_inner 128"),
    ({"n_layer": 2}, "3 layers; expected n_layer 2"),
    ({"n_layer": 10**12}, "n_layer 1000000000000"),
    ({"n_layer": True}, "n_layer True"),
    ({"n_head": 0}, "n_head 0"),
    ({"n_head": 3}, "n_head: 3"),
    ({"n_embd": 18}, r"has shape \[33, 16\], expected \[33, 18\]"),
    ({"vocab_size": 32}, r"has shape \[33, 16\], expected \[32, 16\]"),
    ({"vocab_size": 1}, "vocab_size 1"),
    ({"n_positions": "36"}, "n_positions 36"),
  ],
)
def test_configurations_that_do_not_fit(directory, fields, message):
  edit_json(directory / "config.json", **fields)
  with pytest.raises(UserError, match=message):
    formats.load(directory)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda t: t["transformer.h.2.mlp.c_fc.bias"].__setitem__(5, 1e-7),
      r"transformer\.h\.2\.mlp\.c_fc\.bias in .* aren't zero",
    ),
    (lambda t: t.pop("lm_head.weight"), "has no lm_head.weight"),
    (lambda t: t.pop("transformer.wpe.weight"), "transformer.wpe.weight missing"),
    (
      lambda t: t.update({"lm_head.weight": np.zeros((33, 16), np.float32)}),
      r"lm_head.weight has shape \[33, 16\], expected \[32, 16\]",
    ),
    (
      lambda t: t.update({"transformer.ln_f.weight": np.zeros(16, np.float64)}),
      "transformer.ln_f.weight isn't float32",
    ),
    (
      lambda t: t.update({"transformer.ln_f.bias": np.zeros(16, np.float32)}),
      "transformer.ln_f.bias",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(directory, change, message):
  edit_tensors(directory, change)
  with pytest.raises(UserError, match=message):
    formats.load(directory)


def test_biases_and_causal_masks_may_be_absent_or_there(directory):
  def change(tensors):
    for name in list(tensors):
      if name.endswith(".bias"):
        del tensors[name]
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 36, 36), np.uint8)
    tensors["transformer.h.0.attn.masked_bias"] = np.float32(-1e4)[None]

  edit_tensors(directory, change)
  assert_same(formats.load(directory).params, random_params(CONFIG))


def test_a_classifier_beside_the_model_is_left_out_and_said(directory):
  edit_tensors(directory, lambda t: t.update({"score.weight": np.ones((10, 16), np.float32)}))
  assert any("score.weight" in note for note in formats.load(directory).notes)


def test_a_tied_head_is_told_apart(directory):
  edit_json(directory / "config.json", tie_word_embeddings=True)
  with pytest.raises(UserError, match=r"lm_head.weight differs from transformer.wte.weight"):
    formats.load(directory)
  edit_tensors(directory, lambda t: t.pop("lm_head.weight"))
  loaded = formats.load(directory)
  expected = random_params(CONFIG)
  assert_same(loaded.params, expected | {"wtet": expected["wte"]})
  assert any("tied" in note or "tie_word" in note for note in loaded.notes)
  edit_tensors(
    directory, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()})
  )
  assert_same(formats.load(directory).params, expected | {"wtet": expected["wte"]})


@pytest.mark.parametrize(
  "file",
  [
    "../other.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "x.bin",
    "",
    ".safetensors",
    "a\0.safetensors",
    3,
    None,
  ],
)
def test_an_index_names_files_of_its_own_directory(tmp_path, file):
  huggingface.write_directory(
    tmp_path / "hf", CONFIG, random_params(CONFIG), max_shard_bytes=20_000
  )
  index = tmp_path / "hf" / "model.safetensors.index.json"
  shutil.copy(next((tmp_path / "hf").glob("*.safetensors")), tmp_path / "other.safetensors")
  weight_map = json.loads(index.read_text())["weight_map"]
  edit_json(index, weight_map=weight_map | {"lm_head.weight": file})
  with pytest.raises(UserError, match="bare name"):
    formats.load(tmp_path / "hf")


def test_index_and_files_must_agree(tmp_path):
  huggingface.write_directory(
    tmp_path / "hf", CONFIG, random_params(CONFIG), max_shard_bytes=20_000
  )
  index = tmp_path / "hf" / "model.safetensors.index.json"
  weight_map = json.loads(index.read_text())["weight_map"]
  edit_json(index, weight_map=weight_map | {"transformer.extra": weight_map["lm_head.weight"]})
  with pytest.raises(UserError, match=r"transformer.extra .* stored in None"):
    formats.load(tmp_path / "hf")
  os.remove(tmp_path / "hf" / weight_map["lm_head.weight"])
  with pytest.raises(UserError, match="No such file"):
    formats.load(tmp_path / "hf")


def test_bert_has_no_place_in_transformers(tmp_path):
  with pytest.raises(UserError, match="always masks the future"):
    formats.save(tmp_path / "hf", "huggingface", BERT, random_params(BERT))
  assert not list(tmp_path.iterdir())


def test_an_old_pickle_needs_torch(directory, monkeypatch):
  os.remove(directory / "model.safetensors")
  (directory / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(UserError, match="pip install torch"):
    formats.load(directory)
