"""Image GPT in JAX: pretraining transformers on raw pixels (Chen et al. 2020).

`load` returns a trained model to complete, sample, describe and measure images with (`api.py`).
"""

import sys

# `python -m igpt_jax.main` imports this first: Ctrl-C is answered from here on. (-m: until the module is
# found, sys.argv[0] is that.)
if sys.argv[:1] == ["-m"] and "igpt_jax.main" in sys.orig_argv:
  from igpt_jax import stopping

  stopping.listen()

from typing import TYPE_CHECKING, Any

from igpt_jax import cpu_compiler

if TYPE_CHECKING:
  from igpt_jax.api import Model as Model
  from igpt_jax.api import load as load

__version__ = "0.1.0"

_LAZY = ("Model", "load")  # what reads a model isn't imported before it is asked for

cpu_compiler.avoid_wrong_fusions()
cpu_compiler.keep_collectives_in_order()


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    from igpt_jax import api

    return getattr(api, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_LAZY])
