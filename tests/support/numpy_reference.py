"""The released model once more, in float64 numpy: slow, plain, and independent of our code.

Takes the released checkpoint's variables under their own names and layouts, so that it checks the
import as well as the model. Written from the paper's section 2 and the description of the released
src/model.py; heads, positions and images are handled one expression at a time, with no layout
shared with igpt_jax.
"""

import numpy as np


def random_variables(
  seed: int,
  *,
  n_layer: int,
  n_head: int,
  n_embd: int,
  n_vocab: int = 512,
  n_positions: int,
  causal: bool,
) -> dict[str, np.ndarray]:
  """Float32 variables as a checkpoint names them, all of a size to matter in the output."""
  rng = np.random.default_rng(seed)

  def normal(stddev, *shape):
    return (stddev * rng.standard_normal(shape)).astype(np.float32)

  per_head = (n_head, n_embd // n_head, n_embd)
  variables = {
    "model/wte": normal(0.02, n_vocab, n_embd),
    "model/wpe": normal(0.01, n_positions, n_embd),
    "model/wtet": normal(0.1, n_vocab, n_embd),
    "model/ln_f/g": 1 + normal(0.1, n_embd),
  }
  if causal:
    variables["model/sos"] = normal(0.02, n_embd)
  for layer in range(n_layer):
    prefix = f"model/h{layer}"
    for name in ("q", "k", "v", "c"):
      variables[f"{prefix}/attn/{name}_proj"] = normal(n_embd**-0.5, *per_head)
    variables[f"{prefix}/ln_1/g"] = 1 + normal(0.1, n_embd)
    variables[f"{prefix}/ln_2/g"] = 1 + normal(0.1, n_embd)
    variables[f"{prefix}/mlp/c_fc/w"] = normal(0.1, n_embd, 4 * n_embd)
    variables[f"{prefix}/mlp/c_proj/w"] = normal(0.1, 4 * n_embd, n_embd)
  return variables


def quick_gelu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-1.702 * x))


def rms_norm(x: np.ndarray, g: np.ndarray, epsilon: float) -> np.ndarray:
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * g


def forward(
  variables: dict[str, np.ndarray],
  tokens: np.ndarray,
  keep_mask: np.ndarray | None = None,
  *,
  epsilon: float = 1e-5,
  activation=quick_gelu,
) -> dict[str, np.ndarray]:
  """All outputs for tokens [B, T]; autoregressive if there is a start vector, else BERT.

  Args:
    variables: the checkpoint's.
    tokens: palette indices [B, T].
    keep_mask: BERT: 1 where a pixel is visible [B, T]; None: all are.
    epsilon, activation: the released model's; others show what a mistake would move.

  Returns:
    logits [B, T, V]; nll [B, T] in nats; per_image [B], over all or the masked positions;
    hidden_states [L + 1, B, T, D], the input of each block and the final norm's output;
    last_block_out [B, T, D]; pooled [L + 1, B, D].
  """
  w = {name: value.astype(np.float64) for name, value in variables.items()}
  causal = "model/sos" in w
  batch, length = tokens.shape
  n_layer = sum(name.endswith("/ln_1/g") for name in w)

  embedded = w["model/wte"][tokens]
  if causal:
    previous = embedded
    embedded = np.empty_like(previous)
    embedded[:, 0] = w["model/sos"]
    embedded[:, 1:] = previous[:, :-1]
  elif keep_mask is not None:
    embedded = embedded * keep_mask[:, :, None]
  x = embedded + w["model/wpe"][:length]

  hidden_states, pooled = [], []
  for layer in range(n_layer):
    p = f"model/h{layer}/"
    hidden_states.append(x)
    n = rms_norm(x, w[p + "ln_1/g"], epsilon)
    pooled.append(n.mean(1))
    x = x.copy()
    for wq, wk, wv, wc in zip(
      *(w[p + f"attn/{name}_proj"] for name in ("q", "k", "v", "c")), strict=True
    ):
      q, k, v = n @ wq.T, n @ wk.T, n @ wv.T  # one head's [B, T, head_dim]
      scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
      if causal:
        scores[:, np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]] = -np.inf
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      x += weights / weights.sum(-1, keepdims=True) @ v @ wc
    n = rms_norm(x, w[p + "ln_2/g"], epsilon)
    x = x + activation(n @ w[p + "mlp/c_fc/w"]) @ w[p + "mlp/c_proj/w"]
  final = rms_norm(x, w["model/ln_f/g"], epsilon)
  hidden_states.append(final)
  pooled.append(final.mean(1))

  logits = final @ w["model/wtet"].T
  top = logits.max(-1, keepdims=True)
  log_z = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
  nll = log_z - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  if causal or keep_mask is None:
    counted = np.ones((batch, length))
  else:
    counted = 1.0 - keep_mask
  return {
    "logits": logits,
    "nll": nll,
    "per_image": (nll * counted).sum(1) / counted.sum(1),
    "hidden_states": np.stack(hidden_states),
    "last_block_out": x,
    "pooled": np.stack(pooled),
  }
