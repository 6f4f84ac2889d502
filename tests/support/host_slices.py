"""The command where every process is a slice of its own: run as a script with the command's flags."""

import runpy

from igpt_jax.parallel import hardware

if __name__ == "__main__":
  hardware.slice_index = lambda device: device.process_index
  runpy.run_module("igpt_jax.main", run_name="__main__", alter_sys=True)
