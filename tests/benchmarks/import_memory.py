"""Peak memory and time of importing and exporting a checkpoint of a published size.

  python tests/benchmarks/import_memory.py --size l

Writes random weights as an OpenAI checkpoint (L: 5.4 GB, 64 data files) into a temporary directory,
imports it in a fresh process onto JAX's devices, converts it to Hugging Face's format, imports
that, converts to this program's own, imports that, and prints one line each. Peak is the largest
resident set, everything included; the ratio is to the checkpoint's files. Needs twice the checkpoint's
size on disk and 1.5 times in memory.
"""

import argparse
import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from igpt_jax import checkpoint  # noqa: E402
from igpt_jax.config.fields import Settings  # noqa: E402
from igpt_jax.config.job_fields import ConvertConfig  # noqa: E402
from igpt_jax.jobs import convert as convert_job  # noqa: E402
from igpt_jax.model.image_gpt import abstract_params  # noqa: E402
from igpt_jax.model.model_config import PRESETS, ImageGPTConfig  # noqa: E402
from igpt_jax.parallel.sharding import make_mesh  # noqa: E402
from igpt_jax.pretrained import formats, openai  # noqa: E402
from igpt_jax.pretrained.leaves import placer  # noqa: E402
from igpt_jax.pretrained.tensor_bundle import write_bundle  # noqa: E402


def make(prefix: str, size: str) -> None:
  preset = PRESETS[size]
  config = ImageGPTConfig(preset.n_layer, preset.n_head, preset.n_embd)
  rng = np.random.default_rng(0)
  parts = [part for leaf in openai.table(config) for part in leaf.parts]
  tensors = ((part.name, rng.standard_normal(part.shape, dtype=np.float32)) for part in parts)
  write_bundle(prefix, tensors, num_shards=64)


def load(source: str) -> None:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with formats.open_foreign(source) as foreign:
    shardings = jax.tree.map(lambda leaf: here, abstract_params(foreign.config))
    foreign.load(place=placer(shardings), report=lambda line: print("  " + line, file=sys.stderr))


def convert(source: str, target: str) -> None:
  loaded = formats.load(source)
  formats.save(target, "huggingface", loaded.config, loaded.params)


def convert_to_own(source: str, target: str) -> None:
  settings = Settings(convert=ConvertConfig(source=source, target=target))
  with contextlib.redirect_stdout(sys.stderr):
    convert_job.run(settings, "")


def load_own(source: str) -> None:
  checkpoint.load_pretrained(source, make_mesh(devices=jax.devices()[:1]))


def measured(what: str, size: int, *arguments: str) -> None:
  """Runs one step of this script in its own process, and prints what it cost."""
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
  )
  peak = int(done.stdout)
  print(
    f"{what}: {size / 1e9:.3f} GB of files, peak {peak / 1e9:.3f} GB ({peak / size:.3f} times), "
    f"{time.monotonic() - start:.0f} s",
    flush=True,
  )


def size_of(pattern: str, directory: str) -> int:
  return sum(p.stat().st_size for p in pathlib.Path(directory).glob(pattern) if p.is_file())


STEPS = {
  "make": make,
  "load": load,
  "convert": convert,
  "convert_to_own": convert_to_own,
  "load_own": load_own,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--size", choices=PRESETS, default="l")
  parser.add_argument("--directory", help="where to put the files; default: the system's temporary")
  parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.step:
    STEPS[flags.step[0]](*flags.step[1:])
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return
  with tempfile.TemporaryDirectory(dir=flags.directory) as directory:
    prefix, other = os.path.join(directory, "model.ckpt-1"), os.path.join(directory, "hf")
    make(prefix, flags.size)
    size = size_of("model.ckpt-1.*", directory)
    measured("import from OpenAI's format", size, "--step", "load", prefix)
    measured("conversion to Hugging Face's", size, "--step", "convert", prefix, other)
    size = size_of("*", other)
    measured("import from Hugging Face's format", size, "--step", "load", other)
    shutil.rmtree(other)
    own = os.path.join(directory, "own")
    size = size_of("model.ckpt-1.*", directory)
    measured("conversion to this program's own", size, "--step", "convert_to_own", prefix, own)
    size = size_of("**/*", own)
    measured("import from this program's own", size, "--step", "load_own", own)


if __name__ == "__main__":
  main()
