"""Hosts that differ are told before anything of it is saved: in what, and which of them."""

import jax
import numpy as np
import pytest

from igpt_jax.config.fields import Settings
from igpt_jax.config.run_fields import DataConfig, LogConfig
from igpt_jax.data.order import Stream, train_order
from igpt_jax.errors import HostsDiffer, UserError
from igpt_jax.parallel import hosts
from igpt_jax.workspace import agreement
from support.hosts import HOSTS


@pytest.fixture
def other(monkeypatch):
  """This process is one of two hosts; the other one says the same but for what is set here."""
  said = {}

  def gather(mine):
    theirs = []
    for row in mine:
      name = bytes(row[4:]).partition(b"=")[0].decode()
      theirs.append(agreement._as_bytes(name, said[name]) if name in said else row)
    return np.stack([mine, np.stack(theirs)])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
  return said


def test_what_differs_is_named_with_the_host(other):
  place = {"order": "x" * 200, "empty": ""}
  agreement.check(3, lambda: place)
  other["step"] = 4
  with pytest.raises(UserError, match=r"they differ at step 3: step: host 0 has 3, host 1 4;"):
    agreement.check(3, lambda: place)
  del other["step"]
  other["order"] = "x" * 199 + "y"  # beyond what is shown
  with pytest.raises(UserError, match=r"they differ at step 3: order: host 0 has xxx"):
    agreement.check(3, lambda: place)


def test_parameters_are_compared_by_their_numbers(other):
  params = {"a": jax.numpy.ones(3)}
  agreement.check(3, dict, params)
  other["checksum"] = "0" * 16
  with pytest.raises(HostsDiffer, match="host 1 0000000000000000; nothing of this is saved"):
    agreement.check(3, dict, params)


def test_only_what_is_a_hosts_own_may_differ(other):
  settings = Settings(
    seed=1, data=DataConfig(path="/here", name="folder"), log=LogConfig(wandb=True)
  )
  other.update({"config.data.path": "/there", "config.log.wandb": False})
  agreement.check_settings(settings)
  other["config.data.name"] = "tokens"
  with pytest.raises(UserError, match=r"config\.data\.name: host 0 has folder, host 1 tokens;"):
    agreement.check_settings(settings)


def test_a_batch_that_is_not_of_the_order_is_noticed():
  order = train_order(10, seed=3)
  streams = [Stream(order, 3, 5, host, HOSTS) for host in range(HOSTS)]
  batch = [order[i] for i in range((5 + 2) * 8, (5 + 3) * 8)]
  places = [
    each.place(2, np.array(rows))
    for each, rows in zip(streams, np.split(np.array(batch), 2), strict=True)
  ]
  assert places[0] == places[1]
  assert places[0]["order"].startswith("records 56 to 63 by seed 3, checksum ")
  assert streams[0].place(2, np.array(batch[4:])) != places[0]
  assert streams[0].place(3, np.array(batch[:4])) != places[0]
  assert Stream(train_order(10, seed=4), 3, 5, 0, HOSTS).place(2, np.array(batch[:4])) != places[0]
