"""igpt_jax.main with a fault built in: `python faulty_main.py FAULT ARGUMENTS`.

hang_data: the 6th batch of training never comes. hang_step: neither does the 6th step end.
diverge: the second host learns at another rate than its config says.
other_order: the second host shuffles otherwise.
"""

import os
import sys
import threading

from absl import app

from igpt_jax import config as config_lib
from igpt_jax import main, watchdog
from igpt_jax.data import pipeline
from igpt_jax.training import compilation

_SECOND = os.environ.get("JAX_PROCESS_ID") == "1"


def hanging(function):
  """The function, of which the 6th call doesn't return."""
  calls = []

  def call(*args):
    calls.append(1)
    if len(calls) == 6:
      threading.Event().wait()
    return function(*args)

  return call


def build_in(fault):
  if fault == "hang_data":
    start = pipeline._start

    class Hanging:
      def __init__(self, iterator):
        self._next, self.close = hanging(iterator.__next__), iterator.close

      def __next__(self):
        return self._next()

    pipeline._start = lambda dataset, config: Hanging(start(dataset, config))
  elif fault == "hang_step":
    compilation.CompiledStep.__call__ = hanging(compilation.CompiledStep.__call__)
  elif fault == "diverge" and _SECOND:
    optimizer = config_lib.optimizer

    def other(config):
      config = config.copy_and_resolve_references()
      config.train.learning_rate *= 2
      return optimizer(config)

    config_lib.optimizer = other
  elif fault == "other_order" and _SECOND:
    batches = pipeline.train_batches
    pipeline.train_batches = lambda *args, seed, **settings: batches(
      *args, seed=seed + 1, **settings
    )


if __name__ == "__main__":
  build_in(sys.argv.pop(1))
  watchdog.tell_stacks()
  app.run(main.main, flags_parser=main._parse_flags)
