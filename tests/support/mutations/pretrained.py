"""Mistakes in reading and writing OpenAI's and Hugging Face's files."""

from support.mutations.mutation import Mutation

_REFERENCE = "unit/model/test_golden.py::test_model_agrees_with_reference"
_FORMATS = "unit/pretrained/test_formats.py"
_ALL = f"{_FORMATS}::test_all_formats_hold_the_same_model"

MUTATIONS = (
  Mutation(
    "q-and-k-exchanged",
    "pretrained/openai.py",
    'enumerate("qkv")',
    'enumerate("kqv")',
    _REFERENCE,
  ),
  Mutation(
    "projections-not-transposed",
    "pretrained/openai.py",
    "to_ours=lambda w: w.reshape(square).T,",
    "to_ours=lambda w: w.reshape(square),",
    _REFERENCE,
  ),
  Mutation(
    "layers-in-reverse",
    "pretrained/openai.py",
    'Part(f"model/h{i}/{name}", shape, (i,))',
    'Part(f"model/h{i}/{name}", shape, (layers - 1 - i,))',
    _REFERENCE,
  ),
  Mutation(
    "input-table-for-output",
    "pretrained/openai.py",
    'whole("wtet", config.n_vocab, width)',
    'Leaf(("wtet",), (config.n_vocab, width), (Part("model/wte", (config.n_vocab, width)),))',
    _REFERENCE,
  ),
  Mutation(
    "heads-from-the-width",
    "pretrained/openai.py",
    "    n_head=n_head,\n",
    "    n_head=n_embd // n_head,\n",
    _REFERENCE,
  ),
  Mutation(
    "merged-projection-by-rows",
    "pretrained/huggingface.py",
    "to_ours=lambda w: w.reshape(width, 3, width).transpose(1, 0, 2),",
    "to_ours=lambda w: w.reshape(3, width, width),",
    _ALL,
  ),
  Mutation(
    "start-vector-first",
    "pretrained/huggingface.py",
    'rows("sos", (width,), lambda w: w[-1])',
    'rows("sos", (width,), lambda w: w[0])',
    _ALL,
  ),
  Mutation(
    "colours-shifted-by-one",
    "pretrained/huggingface.py",
    'rows("wte", (vocab, width), lambda w: w[:-1])',
    'rows("wte", (vocab, width), lambda w: w[1:])',
    _ALL,
  ),
  Mutation(
    "tied-head-shifted",
    "pretrained/huggingface.py",
    'rows("wtet", (vocab, width), lambda w: w[:-1]) if tied',
    'rows("wtet", (vocab, width), lambda w: w[1:]) if tied',
    "unit/pretrained/test_huggingface.py::test_a_tied_head_is_told_apart",
  ),
  Mutation(
    "palette-of-any-size",
    "pretrained/clusters.py",
    "if (k := len(clusters)) != n_vocab:",
    "if (k := len(clusters)) > n_vocab:",
    f"{_FORMATS}::test_palettes_that_are_none",
  ),
  Mutation(
    "palette-of-any-scale",
    "pretrained/clusters.py",
    "np.abs(clusters) <= 1 + 1e-3",
    "np.abs(clusters) <= 255",
    f"{_FORMATS}::test_palettes_that_are_none",
  ),
  Mutation(
    "dtype-not-kept",
    "pretrained/leaves.py",
    "dtype = dtypes.pop() if len(dtypes) == 1 else None",
    "dtype = None",
    f"{_FORMATS}::test_round_trip_is_exact",
  ),
  Mutation(
    "weights-unchecked",
    "pretrained/tensor_bundle.py",
    "if mask_crc(crc) != entry.crc:",
    "if mask_crc(crc) is None:",
    "unit/pretrained/test_openai.py::test_every_byte_of_the_weights_is_checked",
  ),
)
