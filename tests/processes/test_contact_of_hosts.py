"""Job first_contact on two hosts: the first one's word decides, and it writes the report of both."""

import json

import pytest

from support.hosts import hosts

pytestmark = pytest.mark.slow

CONTACT = {
  "job": "first_contact", "benchmark.repeats": 2, "benchmark.images": 16, "benchmark.samples": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
  folder = tmp_path_factory.mktemp("contact")
  with hosts(folder / "said", folder / "run", CONTACT) as started:
    started.succeed()
    said = [started.said(host) for host in range(2)]
  return folder / "run", said


def test_two_hosts_measure_together(of_two):
  workdir, (first, second) = of_two
  report = json.loads((workdir / "first_contact.json").read_text())
  machine = report["about"]["machine"]
  assert (machine["hosts"], machine["devices"]) == (2, 8)
  assert report["configs"]["quickstart"]["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
  assert {name: part["state"] for name, part in report["parts"].items()} == {
    f"quickstart: {kind}": "measured" for kind in ("training", "sampling", "input")
  }
  assert report["parts"]["quickstart: input"]["values"]["hosts"] == 2
  assert report["parts"]["quickstart: sampling"]["values"]["samples"] == 8
  assert "part 3 of 3: quickstart: input" in first and "part 3 of 3" not in second
  assert "127.0.0.1" not in (workdir / "first_contact.json").read_text()


def test_two_hosts_go_on(of_two, tmp_path):
  """One of three parts is missing, which the second host can't know."""
  workdir, _ = of_two
  path = workdir / "first_contact.json"
  before = json.loads(path.read_text())
  del before["parts"]["quickstart: sampling"]
  path.write_text(json.dumps(before))
  with hosts(tmp_path / "said", workdir, CONTACT) as started:
    started.succeed()
    assert started.said(0).count("kept from an earlier start") == 2
  after = json.loads(path.read_text())
  assert after["parts"].keys() == before["parts"].keys() | {"quickstart: sampling"}
  same = "quickstart: training"
  assert after["parts"][same] == before["parts"][same]
