"""igpt_jax.main with a fault built in: `python faulty_main.py FAULT ARGUMENTS`.

hang_data: the 6th batch of training never comes. hang_step: the 6th step never ends.
hang_second: it doesn't on the second host.
diverge: the second host learns at another rate than its config says.
other_order: the second host shuffles otherwise.
stuck_reader: after 4 steps the threads that read images never come back.
slow_evaluation: every batch of an evaluation takes long, and is told.
keep, keep_all: no program is too small for the compilation cache, and what came of them is told at the
end; keep_all: hosts ask for them by the same keys on CPUs, too, as they do on TPUs.
bad_once: losses aren't finite from the 7th update on, until the run has gone back.
"""

import atexit
import dataclasses
import json
import os
import sys
import threading
import time

import jax
from absl import app
from jax._src import cache_key, compiler

from igpt_jax import main, stopping, watchdog
from igpt_jax.config import choices
from igpt_jax.data import loader, pipeline
from igpt_jax.parallel import compilation_cache
from igpt_jax.runner import guard, stop_signal
from igpt_jax.training import compilation
from igpt_jax.training import step as step_lib

_SECOND = os.environ.get("JAX_PROCESS_ID") == "1"


def build_in(fault):
  if fault == "hang_second":
    fault = "hang_step" if _SECOND else ""
  if fault in ("hang_data", "hang_step"):
    steps = []
    step, start = compilation.CompiledStep.__call__, pipeline._start

    def counted(*args):
      steps.append(1)
      if fault == "hang_step" and len(steps) == 6:
        threading.Event().wait()
      return step(*args)

    class Hanging:
      def __init__(self, iterator):
        self._iterator, self.close = iterator, iterator.close

      def __next__(self):
        if fault == "hang_data" and len(steps) == 5:
          threading.Event().wait()
        return next(self._iterator)

    compilation.CompiledStep.__call__ = counted
    pipeline._start = lambda dataset, config: Hanging(start(dataset, config))
  elif fault == "diverge" and _SECOND:
    optimizer_config = choices.optimizer_config

    def other(settings):
      rate = optimizer_config(settings).learning_rate
      return dataclasses.replace(optimizer_config(settings), learning_rate=2 * rate)

    choices.optimizer_config = other
  elif fault == "other_order" and _SECOND:
    batches = pipeline.train_batches
    pipeline.train_batches = lambda *args, seed, **settings: batches(
      *args, seed=seed + 1, **settings
    )
  elif fault == "stuck_reader":
    read, step, steps = loader.Loader.train_element, compilation.CompiledStep.__call__, []

    def stuck(self, *args):
      if len(steps) >= 4:
        threading.Event().wait()
      return read(self, *args)

    loader.Loader.train_element = stuck
    compilation.CompiledStep.__call__ = lambda self, *args: steps.append(1) or step(self, *args)
  elif fault == "slow_evaluation":
    through = stop_signal.StopSignal.through

    def slowly(self, batches):
      for number, batch in enumerate(through(self, batches), 1):
        print("evaluating", number, flush=True)
        time.sleep(0.3)
        yield batch

    stop_signal.StopSignal.through = slowly
  elif fault in ("keep", "keep_all"):
    compilation_cache._LEAST_SECONDS = 0.0
    programs = compilation_cache.Tally()
    missed = []
    compiler.log_persistent_cache_miss = lambda name, key: missed.append(name)
    atexit.register(
      lambda: print("programs:", json.dumps(programs.programs() | {"missed": missed}), flush=True)
    )
    if fault == "keep_all":
      cache_key._hash_accelerator_config = lambda hash_obj, devices: None
  elif fault == "bad_once":
    make_step, go_back = step_lib.make_train_step, guard.go_back
    rolled = []
    # The step is the same one, traced again.
    guard.go_back = lambda *args: (go_back(*args), rolled.append(True), jax.clear_caches())

    def make(config, objective, *rest):
      def train_step(state, batch):
        bad = 1.0 if rolled else float("nan")

        def changed(*args):
          nll, weight = objective(*args)
          return nll * jax.numpy.where(state.step >= 6, bad, 1.0), weight

        return make_step(config, changed, *rest)(state, batch)

      return train_step

    step_lib.make_train_step = make


if __name__ == "__main__":
  build_in(sys.argv.pop(1))
  watchdog.tell_stacks()
  stopping.listen()
  app.run(main.main, flags_parser=main._parse_flags)
