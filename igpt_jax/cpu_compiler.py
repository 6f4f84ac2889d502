"""Workarounds for XLA's CPU compiler: a fusion that computes wrong results, and collectives that never end.

jax 0.10.2 (the only version in our range for Python 3.11) leaves some products to YNNPACK; followed by
a reduction, over more than 32,768 rows, they come out wrong (jax-ml/jax issue 39103), and 0.11 can't
compile some of bfloat16. Without that fusion results are right, and a training step takes as long.
tests/unit/ground/test_cpu_compiler.py holds the program that shows it.

On several CPU devices, collectives that don't depend on each other may begin in another order on each, and
wait for each other until XLA ends the process, after 40 seconds: seen with the gather of the head's table,
which its scheduler puts beside the loop over layers. Its other scheduler puts what is computed where it is
used: there that gather comes after the loop. On one device it is a few per cent slower.
"""

import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import MutableMapping

_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_MENDED_IN = (0, 12)  # of jaxlib
_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"
_DEVICES = re.compile(r"xla_force_host_platform_device_count=(\d+)")


def _is_faulty(version: str) -> bool:
  return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _MENDED_IN


def avoid_wrong_fusions(environment: MutableMapping[str, str] = os.environ) -> None:
  """Sets the flag in XLA_FLAGS, where jaxlib needs it and the user hasn't set it.

  XLA reads XLA_FLAGS once, when devices are initialised, so this runs when `igpt_jax` is imported. It
  accepts the flag on every platform, but ends the process for unknown flags; so jaxlib's version
  decides, nothing else.
  """
  try:
    version = importlib.metadata.version("jaxlib")
  except importlib.metadata.PackageNotFoundError:
    return  # the version is unknown if jax isn't installed as a package
  flags = environment.get("XLA_FLAGS", "")
  if not _is_faulty(version) or _FLAG in flags:
    return
  environment["XLA_FLAGS"] = f"{flags} --{_FLAG}=".strip()
  bridge = sys.modules.get("jax._src.xla_bridge")
  if bridge is not None and bridge.backends_are_initialized():
    warnings.warn(
      f"igpt_jax: a device was used before igpt_jax was imported; jaxlib {version} can compute wrong "
      "results on a CPU then (jax-ml/jax issue 39103); fix: import igpt_jax first",
      stacklevel=3,
    )


def keep_collectives_in_order(
  devices: int = 0, environment: MutableMapping[str, str] = os.environ
) -> None:
  """Sets the scheduler in XLA_FLAGS if there will be several CPU devices and the user hasn't set it.

  Call it before devices are initialised.

  Args:
    devices: their number; 0: what the environment, or `jax.config`, says.
    environment: where the flags are.
  """
  flags = environment.get("XLA_FLAGS", "")
  if not devices:
    forced, jax = _DEVICES.search(flags), sys.modules.get("jax")
    configured = jax.config.jax_num_cpu_devices if jax else 0
    told = environment.get("JAX_NUM_CPU_DEVICES", "")
    devices = max(int(forced[1]) if forced else 0, configured, int(told) if told.isdigit() else 0)
  if devices > 1 and _SCHEDULER not in flags:
    environment["XLA_FLAGS"] = f"{flags} --{_SCHEDULER}=false".strip()
