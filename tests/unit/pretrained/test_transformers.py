"""What we write, transformers loads and computes alike; what it writes, we do.

Optional: needs torch and transformers, which the package itself doesn't.
"""

import json
import os

import jax
import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.model.image_gpt import bind
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained import formats, huggingface
from igpt_jax.pretrained.tensor_bundle import write_bundle
from support import numpy_reference

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# transformers 4 truncates sqrt(head_dim) to an integer: only squares give the released model there.
SHAPE = dict(n_layer=3, n_head=4, n_embd=64, n_vocab=64, n_positions=49)
CONFIG = ImageGPTConfig(**SHAPE)


@pytest.fixture
def params(tmp_path):
  variables = numpy_reference.random_variables(0, causal=True, **SHAPE)
  write_bundle(tmp_path / "model.ckpt-1", variables.items())
  return formats.load(tmp_path / "model.ckpt-1").params


@pytest.fixture
def tokens():
  shape = (2, SHAPE["n_positions"])
  return np.random.default_rng(1).integers(SHAPE["n_vocab"], size=shape, dtype=np.int32)


def their_logits(model, tokens):
  """Logits of every pixel, the first included: they want the start token given."""
  start = np.full_like(tokens[:, :1], model.config.vocab_size - 1)
  input_ids = torch.from_numpy(np.concatenate([start, tokens[:, :-1]], axis=1)).long()
  with torch.no_grad():
    return model.eval()(input_ids).logits.numpy()


def our_logits(config, params, tokens):
  return np.asarray(jax.jit(lambda p, t: bind(config, p)(t))(params, tokens))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
def test_transformers_loads_what_we_write(tmp_path, params, tokens, max_shard_bytes):
  target = tmp_path / "hf"
  huggingface.write_directory(target, CONFIG, params, max_shard_bytes=max_shard_bytes)
  assert (target / "model.safetensors").exists() == (max_shard_bytes > 10**6)
  model, loading = transformers.ImageGPTForCausalImageModeling.from_pretrained(
    target, output_loading_info=True
  )
  assert not any(loading.values()), loading
  found = their_logits(model, tokens)
  np.testing.assert_allclose(found, our_logits(CONFIG, params, tokens), rtol=0, atol=5e-5)


@pytest.mark.parametrize("written", ["whole", "in files", "pickled"])
def test_we_load_what_transformers_writes(tmp_path, tokens, written):
  torch.manual_seed(0)
  config = transformers.ImageGPTConfig(
    n_layer=2, n_head=2, n_embd=32, vocab_size=65, n_positions=49, initializer_range=0.3
  )
  model = transformers.ImageGPTForCausalImageModeling(config)
  target = tmp_path / "hf"
  if written == "pickled":
    model.config.save_pretrained(target)
    torch.save(model.state_dict(), target / "pytorch_model.bin")
  else:
    model.save_pretrained(target, max_shard_size="10KB" if written == "in files" else "1GB")
    assert (target / "model.safetensors.index.json").exists() == (written == "in files")
  loaded = formats.load(target)
  np.testing.assert_allclose(
    our_logits(loaded.config, loaded.params, tokens), their_logits(model, tokens), rtol=0, atol=5e-5
  )


def test_their_fine_tuned_biases_are_refused(tmp_path):
  config = transformers.ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, n_positions=49)
  model = transformers.ImageGPTForCausalImageModeling(config)
  torch.nn.init.normal_(model.transformer.h[1].mlp.c_proj.bias)
  model.save_pretrained(tmp_path / "hf")
  with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_proj\.bias"):
    formats.load(tmp_path / "hf")


def test_their_classifier_alone_is_refused(tmp_path):
  config = transformers.ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=49, num_labels=3)
  transformers.ImageGPTForImageClassification(config).save_pretrained(tmp_path / "hf")
  with pytest.raises(UserError, match=r"has no lm_head\.weight"):
    formats.load(tmp_path / "hf")


def test_their_processor_finds_our_colours(tmp_path, params):
  rng = np.random.default_rng(0)
  clusters = rng.uniform(-1, 1, (SHAPE["n_vocab"], 3)).astype(np.float32)
  formats.save(tmp_path / "hf", "huggingface", CONFIG, params, clusters=clusters)
  try:
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
  except ImportError as error:
    pytest.skip(f"transformers' image processors need more than is installed: {error}")
  image = rng.integers(256, size=(7, 7, 3), dtype=np.uint8)
  found = np.asarray(processor(image, return_tensors="np")["input_ids"])[0]
  distance = ((image.reshape(-1, 1, 3) / 127.5 - 1 - clusters) ** 2).sum(-1)
  np.testing.assert_array_equal(found, distance.argmin(-1))
  processor.save_pretrained(tmp_path / "processor")
  os.replace(
    tmp_path / "processor" / "preprocessor_config.json", tmp_path / "hf/preprocessor_config.json"
  )
  np.testing.assert_allclose(formats.load(tmp_path / "hf").clusters, clusters, rtol=0, atol=1e-7)


def test_the_written_configuration_is_what_transformers_would_write(tmp_path, params):
  """No field of ours has another meaning there: loaded and saved again, each keeps its value."""
  huggingface.write_directory(tmp_path / "hf", CONFIG, params)
  transformers.ImageGPTConfig.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
  ours, theirs = (
    json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again")
  )
  # Left out are only values that are transformers' own defaults.
  assert {name: theirs.get(name, value) for name, value in ours.items()} == ours
  assert theirs.keys() >= {"n_layer", "n_head", "n_embd", "n_positions", "vocab_size"}
