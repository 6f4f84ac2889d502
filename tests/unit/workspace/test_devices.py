"""The mesh and remat that a job uses: as set, or chosen where the settings leave them open."""

import dataclasses

import jax
import pytest

from igpt_jax.config import choices
from igpt_jax.config.fields import Settings, with_values
from igpt_jax.errors import UserError
from igpt_jax.parallel import sharding
from igpt_jax.workspace import devices
from support import tiny

CHIPS = [tiny.Chip(n) for n in range(16)]


def small(**values):
  """Settings of iGPT-S."""
  own = {"data.resolution": 32, "model.dtype": "bfloat16"}
  return with_values(Settings(), own | {name.replace("__", "."): v for name, v in values.items()})


def arranged(settings, chips=CHIPS, batch_size=128, mesh=None):
  model, mesh = devices.arranged(settings, choices.model_config(settings), batch_size, mesh, chips)
  return tuple(mesh.shape.values()), model.remat


def test_what_is_open_is_chosen_and_said_in_one_line(capsys):
  assert arranged(small()) == ((2, 8, 1), "names")
  assert capsys.readouterr().out == (
    "mesh data 2 × fsdp 8 × tensor 1, remat names: chosen for 16 × TPU v5 lite, 8 images at a time on each "
    "(others: config.mesh, config.model.remat)\n"
  )
  assert arranged(small(model__size="xl"))[1] == "full"  # where the size's own would be full, too
  # Where the size's own would be names.
  assert arranged(small(model__size="m"), CHIPS[:2]) == ((1, 2, 1), "full")


def test_what_is_set_wins_and_needs_no_line(capsys):
  assert arranged(small(mesh__fsdp=4, model__remat="full")) == ((4, 4, 1), "full")
  made = sharding.make_mesh(8, 2, devices=CHIPS)
  assert arranged(small(model__remat="none"), mesh=made) == ((8, 2, 1), "none")
  assert capsys.readouterr().out == ""
  assert arranged(small(mesh__fsdp=1)) == ((16, 1, 1), "names")
  assert capsys.readouterr().out.startswith("remat names: chosen for 16 ×")


@pytest.mark.parametrize(
  ("given", "shape"),
  [
    ({"data": 4}, (4, 4, 1)),  # the rest splits the weights
    ({"data": 1}, (1, 16, 1)),
    ({"data": 2, "tensor": -1}, (2, 1, 8)),
    ({"tensor": 4}, (1, 4, 4)),  # chosen for the four groups
    ({"data": 1, "fsdp": -1}, (1, 16, 1)),  # as the paper's large configs were
  ],
)
def test_some_sizes_may_be_set(given, shape, capsys):
  assert arranged(small(**{f"mesh__{axis}": size for axis, size in given.items()}))[0] == shape
  said = capsys.readouterr().out
  assert said.startswith("mesh ") == (given == {"tensor": 4})  # what is left isn't chosen
  assert ("images at a time on each 4 (" in said) == ("tensor" in given and shape[2] == 4)


@pytest.mark.parametrize("given", [{"data": 3}, {"tensor": 3}, {"tensor": 32}, {"fsdp": 5}])
def test_what_does_not_divide_is_refused(given):
  with pytest.raises(UserError, match=r"doesn't multiply to the 16 devices .*fix: config\.mesh"):
    arranged(small(**{f"mesh__{axis}": size for axis, size in given.items()}))


def test_one_accelerator_recomputes_where_it_must(capsys):
  assert arranged(small(), CHIPS[:1]) == ((1, 1, 1), "full")
  assert capsys.readouterr().out.startswith("remat full: chosen for 1 × TPU v5 lite, 128 images")
  assert arranged(small(), CHIPS[:1], batch_size=16) == ((1, 1, 1), "names")


def test_cpus_are_as_ever(capsys):
  tiny.mesh_of((8, 1, 1))
  assert arranged(small(), jax.devices()[:8]) == ((8, 1, 1), "names")
  assert arranged(small(model__size="xl"), jax.devices()[:8]) == ((8, 1, 1), "full")
  model = tiny.make_config()
  # An older version's config.json has its default: one.
  for settings in (small(), small(mesh__fsdp=1)):
    assert devices.mesh_of(settings, model).shape == sharding.make_mesh().shape
    assert devices.sampling_mesh(settings, model, 6).size == 6
    assert devices.sampling_mesh(settings, model).shape == sharding.make_mesh().shape
  assert devices.sampling_mesh(small(mesh__data=2), model, 6).shape["data"] == 2
  assert capsys.readouterr().out == ""


def test_sampling_splits_weights_no_more_than_memory_asks_for(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda *_: list(CHIPS))
  large, xl = (choices.model_config(small(model__size=size)) for size in ("l", "xl"))
  assert tuple(devices.sampling_mesh(small(), xl, 6).shape.values()) == (4, 1, 4)  # 27 GB of 16
  assert tuple(devices.sampling_mesh(small(), large, 6).shape.values()) == (16, 1, 1)
  assert tuple(devices.sampling_mesh(small(mesh__fsdp=8), xl, 6).shape.values()) == (2, 8, 1)
  # Keys and values of 64 images of 4,096 positions leave the weights less.
  wide = dataclasses.replace(xl, n_positions=4_096)
  assert tuple(devices.sampling_mesh(small(), wide, together=1).shape.values()) == (4, 1, 4)
  assert tuple(devices.sampling_mesh(small(), wide, together=64).shape.values()) == (2, 1, 8)
  assert tuple(devices.mesh_of(small(), large).shape.values()) == (2, 8, 1)
