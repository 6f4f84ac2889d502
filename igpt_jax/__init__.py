"""Image GPT in JAX: pretraining transformers on raw pixels (Chen et al. 2020)."""

import sys

# `python -m igpt_jax.main` imports this first: Ctrl-C is answered from here on. (-m: until the module is
# found, sys.argv[0] is that.)
if sys.argv[:1] == ["-m"] and "igpt_jax.main" in sys.orig_argv:
  from igpt_jax import stopping

  stopping.listen()

from igpt_jax import cpu_compiler

__version__ = "0.1.0"

cpu_compiler.avoid_wrong_fusions()
