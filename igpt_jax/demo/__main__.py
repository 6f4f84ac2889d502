"""python -m igpt_jax.demo --checkpoint=runs/cifar10_16 --port=7860

Serves a page that completes the lower part of an image, row by row. Without --checkpoint the model that comes
with igpt_jax does. It binds to this machine alone
unless --host is given; uploads are kept in memory while they are processed, and nowhere else.
"""

import argparse
import os
import sys

from igpt_jax.errors import UserError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  from igpt_jax.demo.limits import Limits

  limits = Limits()
  parser = argparse.ArgumentParser(
    prog="python -m igpt_jax.demo", description="A page to complete images on."
  )
  add = parser.add_argument
  add(
    "--checkpoint",
    action="append",
    help="to choose from; may be given again (default: the model that comes with igpt_jax)",
  )
  add("--palette", default="", help=".npy, for checkpoints that carry none")
  add("--host", default="127.0.0.1", help="address to bind to (default: this machine alone)")
  add("--port", type=int, default=7860, help="0: any that is free")
  add("--samples", type=int, default=limits.samples, help="of one image, at most")
  add(
    "--upload_mb", type=float, default=limits.upload_bytes / 2**20, help="an image's size, at most"
  )
  add("--waiting", type=int, default=limits.waiting, help="people in line, at most")
  add("--seconds", type=float, default=limits.seconds, help="to draw one image's samples, at most")
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  options = parse(argv)
  try:
    from igpt_jax.demo import models, serve
    from igpt_jax.demo.limits import Limits
    from igpt_jax.parallel import compilation_cache, hardware
    from igpt_jax.pretrained import packaged
    from igpt_jax.workspace import weights

    hardware.check_platform()
    compilation_cache.use("user", "")
    limits = Limits(
      samples=options.samples,
      upload_bytes=round(options.upload_mb * 2**20),
      waiting=options.waiting,
      seconds=options.seconds,
    )
    serve.check_installed()
    sock = serve.bind(options.host, options.port)
    if not options.checkpoint:
      weights.say_packaged("--checkpoint=WORKDIR, or openai/imagegpt-small")
    served = models.Models(options.checkpoint or [packaged.NAME], options.palette)
    compilation_cache.use("user", "")
    served.completer(0)  # errors of reading it are raised before serving
    serve.run(served, limits, sock)
    return 0
  except UserError as error:
    print(f"igpt_jax.demo: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130


if __name__ == "__main__":
  status = main()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)  # Python would wait for the thread that compiles, for minutes
