"""The command `igpt_jax`, also `python -m igpt_jax`: runs `python -m igpt_jax.main` from its first line."""

import runpy


def run() -> None:
  """Runs `main` as the program itself, which hears signals before it imports anything slow."""
  runpy.run_module("igpt_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  run()
