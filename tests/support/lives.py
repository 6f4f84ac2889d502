"""Runs the command many times, each in a process forked from one that has imported all of it.

As a program it reads a life a line from stdin, JSON: {"args": …, "env": …, "out": file, "err": file};
it answers with the life's process id at once, and with its number and status when it is over.
"""

import json
import os
import queue
import subprocess
import sys
import threading

from support.paths import ROOT, TESTS


class Lives:
  """Starts lives, from this process; `environment` is of all of them."""

  def __init__(self, **environment: str):
    self._server = subprocess.Popen(
      [sys.executable, __file__], cwd=ROOT, text=True, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", **environment},
    )  # fmt: skip
    self._started: queue.Queue[int] = queue.Queue()
    self._ended: dict[int, int] = {}
    self._news = threading.Condition()
    threading.Thread(target=self._listen, daemon=True).start()

  def _listen(self) -> None:
    for line in self._server.stdout:
      said = json.loads(line)
      if "status" in said:
        with self._news:
          self._ended[said["pid"]] = said["status"]
          self._news.notify_all()
      else:
        self._started.put(said["pid"])

  def begin(self, args, out, err=None, **env: str) -> int:
    """The process id of a life with these arguments, which speaks to the files `out` and `err`; or
    to `out` alone."""
    life = {"args": list(map(str, args)), "env": env, "out": str(out), "err": str(err or out)}
    self._server.stdin.write(json.dumps(life) + "\n")
    self._server.stdin.flush()
    return self._started.get(timeout=60)

  def status(self, pid: int, timeout: float) -> int | None:
    """Exit status, as of os.waitstatus_to_exitcode; None: it goes on."""
    with self._news:
      self._news.wait_for(lambda: pid in self._ended, timeout)
      return self._ended.get(pid)

  def close(self) -> None:
    self._server.stdin.close()
    self._server.wait(60)


def _serve() -> None:
  """Forks a process for each line, until there are no more."""
  from absl import app

  from igpt_jax import main, stopping
  from igpt_jax.jobs import pretrain

  assert pretrain  # imported for the lives
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  lock = threading.Lock()

  def tell(**said: int) -> None:
    with lock:
      answers.write(json.dumps(said) + "\n")

  def wait(pid: int) -> None:
    tell(pid=pid, status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

  for line in iter(sys.stdin.readline, ""):
    life = json.loads(line)
    pid = os.fork()
    if not pid:
      for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(life[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      os.environ.update(life["env"])
      sys.argv = ["igpt_jax", *life["args"]]
      stopping.listen()
      app.run(main.main, flags_parser=main._parse_flags)
    tell(pid=pid)
    threading.Thread(target=wait, args=(pid,)).start()


if __name__ == "__main__":
  _serve()
