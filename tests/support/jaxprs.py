"""Programs as JAX traces them."""

import jax


def within(equation) -> list:
  """The jaxprs that an equation runs: a loop's body, a branch, a call."""
  leaves = jax.tree.leaves(
    equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
  )
  inner = (getattr(leaf, "jaxpr", leaf) for leaf in leaves)
  return [jaxpr for jaxpr in inner if hasattr(jaxpr, "eqns")]


def equations(jaxpr):
  """All equations of a jaxpr and of those within it."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in within(equation):
      yield from equations(inner)
