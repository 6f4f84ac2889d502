"""Muon: momentum whose matrices are orthogonalised, each by itself (Jordan et al. 2024).

The blocks' four matrices are Muon's, and those of the heads of a position's codes, if it has several. All else
isn't a map between activations and stays with Adam: tables, gains, the start vector, the output table, a
classifier's head. Every update of Muon has a root mean
square of about 0.2, as Adam's have, so one learning rate serves both (Liu et al. 2025, "Muon is Scalable
for LLM Training", arXiv 2502.16982, section 2.2).
"""

import functools

import jax
import jax.numpy as jnp
import optax

from igpt_jax.model import codes, layers
from igpt_jax.model.parametrisation import names
from igpt_jax.parallel import hardware
from igpt_jax.parallel.whole_matrices import on_whole_matrices

MOMENTUM = 0.95
RMS = 0.2

# The quintic that Jordan chose: 5 of its steps take singular values from [0.003, 1] to about [0.7, 1.2].
# (They don't converge to 1, which costs nothing in the loss.)
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5

# Where Muon's matrices stand among the parameters, and their logical axes: [layers, 3, D, D] are three
# matrices of each layer.
_MATRICES: dict[tuple[str, ...], tuple[str, ...]] = {
  ("blocks", "attn", "qkv"): ("layers", *layers.TO_QKV.weight_axes),
  ("blocks", "attn", "proj"): ("layers", *layers.FROM_HEADS.weight_axes),
  ("blocks", "mlp", "fc"): ("layers", *layers.TO_INNER.weight_axes),
  ("blocks", "mlp", "proj"): ("layers", *layers.FROM_INNER.weight_axes),
  ("heads", "hidden"): codes.TO_HIDDEN.weight_axes,
}


def is_muons(path) -> bool:
  """True if Muon updates the parameter at a path of jax.tree_util, not Adam."""
  return names(path) in _MATRICES


def scale_by_muon() -> optax.GradientTransformation:
  """Returns a transformation of Muon's matrices, stacked on the axes before; its state is a momentum.

  Nesterov's momentum as in Jordan's code, but for a factor that orthogonalisation takes out again.
  """
  orthogonal = optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(_orthogonalised, updates)
  )
  return optax.chain(optax.trace(MOMENTUM, nesterov=True), orthogonal)


def _orthogonalised(path, momentum: jax.Array) -> jax.Array:
  """Returns the update [..., rows, columns] of a stack of matrices, its RMS about `RMS`."""
  # bfloat16 as in the papers, half the bytes between devices too. CPUs emulate it slowly.
  dtype = jnp.float32 if hardware.platform() == "cpu" else jnp.bfloat16
  axes = _MATRICES[names(path)]
  # Orthogonal rows or columns have an RMS of 1/sqrt(the longer side).
  orthogonal = functools.partial(newton_schulz, size=RMS * max(momentum.shape[-2:]) ** 0.5)
  made = on_whole_matrices(orthogonal, momentum.astype(dtype), axes)
  return made.astype(momentum.dtype)


def newton_schulz(x: jax.Array, size: float = 1.0) -> jax.Array:
  """Returns matrices [..., m, n] with the singular vectors of `x` and singular values near `size`.

  Zeros stay zeros. The products are in the dtype of `x`.
  """
  wide = x.shape[-2] <= x.shape[-1]
  a, b, c = _COEFFICIENTS
  for step in range(_STEPS):
    gram = x @ x.mT if wide else x.mT @ x
    factor = jnp.float32(1.0 if step < _STEPS - 1 else size)
    if step == 0:
      # The Frobenius norm, which bounds the largest singular value, is the trace's root. Dividing the
      # small matrices by it leaves the large one alone.
      square = jnp.trace(gram.astype(jnp.float32), axis1=-2, axis2=-1)[..., None, None]
      inverse = jnp.where(square > 0, jax.lax.rsqrt(square), 0.0)
      gram = (gram * inverse**2).astype(x.dtype)
      factor = factor * inverse
    product = gram @ gram
    polynomial = a * jnp.eye(gram.shape[-1]) + b * gram + c * product
    polynomial = (factor * polynomial).astype(x.dtype)
    x = polynomial @ x if wide else x @ polynomial
  return x


def flops(params) -> float:
  """FLOPs of the matrix products of one update of the parameters (arrays or shapes)."""
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if is_muons(path):
      m, n = sorted(leaf.shape[-2:])
      # x xᵀ and the last product: m²n multiplications each; the square of x xᵀ: m³.
      total += (leaf.size // (m * n)) * _STEPS * 2 * (2 * m * m * n + m**3)
  return float(total)
