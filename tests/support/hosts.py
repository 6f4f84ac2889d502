"""The command as two hosts run it: two real processes of four devices each, on loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import time

from support.paths import ROOT

HOSTS, DEVICES = 2, 4
SECONDS = 240  # that any of these processes may live

# The quickstart, made small enough for a test.
SMALL = {
  "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16,
  "train.batch_size": 16, "train.steps": 8, "train.warmup_steps": 2, "train.log_every": 1,
  "train.eval_every": 4, "train.eval_images": 30, "train.checkpoint_every": 4,
  "train.progress_images": 2, "sample.samples": 3, "sample.completions": 2, "sample.per_image": 2,
  "features.images": 200, "features.baselines": ("pixels",), "probe.max_iterations": 15,
  "mesh.fsdp": 2,
}  # fmt: skip


class Hosts:
  """The processes of one command; `per_host` adds overrides to some of them.

  `before` is what each process' command begins with, `address` where the first one is reached,
  `program` what Python is to run.
  """

  def __init__(
    self,
    folder,
    workdir,
    overrides,
    per_host=None,
    *,
    before=((),) * HOSTS,
    address="127.0.0.1",
    program=("-m", "igpt_jax.main"),
  ):
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self._files = [[folder / f"{i}.{stream}" for stream in ("out", "err")] for i in range(HOSTS)]
    self.processes = []
    for i in range(HOSTS):
      settings = {**SMALL, **overrides, **(per_host or {}).get(i, {})}
      environment = {
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COORDINATOR_ADDRESS": f"{address}:{port}",
        "JAX_NUM_PROCESSES": str(HOSTS),
        "JAX_PROCESS_ID": str(i),
      }
      with open(self._files[i][0], "w") as out, open(self._files[i][1], "w") as err:
        self.processes.append(
          subprocess.Popen(
            [
              *before[i], sys.executable, *program, "--distributed",
              "--config=configs/quickstart.py", f"--workdir={workdir}",
              *(f"--config.{name}={value}" for name, value in settings.items()),
            ],
            cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=err,
          )
        )  # fmt: skip

  def said(self, host, stream="out"):
    return self._files[host][stream == "err"].read_text()

  def wait_for(self, text):
    """Until the first host has said it."""
    end = time.monotonic() + SECONDS
    while text not in self.said(0):
      assert self.processes[0].poll() is None and time.monotonic() < end, self.everything()
      time.sleep(0.05)

  def statuses(self):
    end = time.monotonic() + SECONDS
    return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]

  def everything(self):
    return "\n".join(
      self.said(i, stream)[-3_000:] for i in range(HOSTS) for stream in ("out", "err")
    )

  def succeed(self):
    assert self.statuses() == [0] * HOSTS, self.everything()


@contextlib.contextmanager
def hosts(*arguments, **settings):
  started = Hosts(*arguments, **settings)
  try:
    yield started
  finally:
    for process in started.processes:
      process.kill()
      process.wait()
