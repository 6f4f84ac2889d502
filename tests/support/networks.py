"""Two networks with a cable between them that can be cut; Linux, as root."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import time

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclasses.dataclass(frozen=True)
class Networks:
  """`before`: what a command begins with to run in each of them."""

  before: tuple[tuple[str, ...], ...]

  def cut(self):
    """Nothing passes from now on, and nobody is told."""
    subprocess.run([*self.before[0], "ip", "link", "set", "cable0", "down"], check=True)


@contextlib.contextmanager
def two_networks(folder):
  """Skips the test where they can't be made."""
  if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("ip"):
    pytest.skip("needs root and iproute2 to make networks")
  folder.mkdir(exist_ok=True)
  known = folder / "hosts"
  known.write_text(
    "127.0.0.1 localhost\n" + "".join(f"{each} host{i}\n" for i, each in enumerate(ADDRESSES))
  )
  holders = []
  with contextlib.ExitStack() as stack:
    for i in range(2):
      # What a process is called in a network is where gloo has the others look for it.
      script = (
        f"hostname host{i} && mount --bind {known} /etc/hosts && echo ready && exec sleep 600"
      )
      holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "--uts", "sh", "-c", script], stdout=subprocess.PIPE
      )
      stack.enter_context(holder)
      stack.callback(holder.kill)
      holders.append(holder)
      if not holder.stdout.readline():
        pytest.skip("no right to make networks")
    before = tuple(
      (
        "nsenter",
        f"--target={holder.pid}",
        "--net",
        "--mount",
        "--uts",
        f"--wd={os.getcwd()}",
        "--",
      )
      for holder in holders
    )

    def ip(i, *command):
      subprocess.run([*before[i], "ip", *command], check=True)

    ip(
      0,
      "link",
      "add",
      "cable0",
      "type",
      "veth",
      "peer",
      "name",
      "cable1",
      "netns",
      str(holders[1].pid),
    )
    for i in range(2):
      ip(i, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"cable{i}")
      ip(i, "link", "set", f"cable{i}", "up")
      ip(i, "link", "set", "lo", "up")
    time.sleep(0.5)
    yield Networks(before)
