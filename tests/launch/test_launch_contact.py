"""launch/first_contact.sh, run against the stand-in for Python of test_launch."""

import pytest


def starts(world):
  """The flags of every start of the program, without its name."""
  return [call[2:] for call in world.calls("main.home")]


def test_a_part_that_ends_the_program_does_not_end_the_report(world):
  world.write("train.sh", '[ "$attempt" -gt 2 ] || exit 134')
  result = world.run("first_contact.sh", "--extra=none", "--", "--config.first_contact.minutes=3")
  assert result.returncode == 0, result.stderr
  flags = [
    "--config=configs/first_contact.py",
    f"--workdir={world.repo}/runs/first_contact",
    "--config.first_contact.minutes=3",
  ]
  assert starts(world) == [flags] * 3
  assert result.stderr.count("ended the program with status 134; going on with the rest") == 2


def test_it_does_not_start_without_end(world):
  world.write("train.sh", "exit 139")
  result = world.run("first_contact.sh", "--extra=none", "--workdir=somewhere")
  assert result.returncode == 139
  assert len(starts(world)) == 10
  assert starts(world)[0][1] == f"--workdir={world.env['HOME']}/somewhere"


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_another_end_is_the_end(world, status):
  world.write("train.sh", f"exit {status}")
  assert world.run("first_contact.sh", "--extra=none").returncode == status
  assert len(starts(world)) == 1


def test_it_installs_what_the_accelerator_needs(world):
  assert world.run("first_contact.sh", "--extra=cuda").returncode == 0
  assert any(f"{world.repo}[cuda]" in call for call in world.calls("pip"))
  refused = world.run("first_contact.sh", "--extra=rocm")
  assert refused.returncode == 2 and "expected cuda, tpu or none" in refused.stderr
