"""Regions of an image, and BERT models that fill them through job complete."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.errors import UserError
from igpt_jax.jobs import complete
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.sampling import completer, filler
from support import own_checkpoint, tiny
from support.tiny import compilations

pytestmark = pytest.mark.usefixtures("quick_compile")

DRAW = SamplingConfig()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  return own_checkpoint.write(tmp_path_factory.mktemp("bert") / "run", causal=False)


def settings(trained, **changes):
  return tiny.settings_of(changes={
    "job": "complete", "checkpoint": trained, "complete.n": 2, "sample.batch_size": 4,
    "complete.passes": 3, "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2,
    **{name if "." in name else f"complete.{name}": each for name, each in changes.items()},
  })  # fmt: skip


def known_of(trained, **changes):
  return filler.known_pixels(settings(trained, **changes), checkpoint.describe(trained))


@pytest.mark.parametrize(
  "hide, keep, expected",
  [
    ("lower", 0.5, "1111 1111 0000 0000"),
    ("lower", 0.75, "1111 1111 1111 0000"),
    ("upper", 0.75, "0000 1111 1111 1111"),
    ("left", 0.5, "0011 0011 0011 0011"),
    ("right", 0.25, "1000 1000 1000 1000"),
    ("centre", 0.75, "1111 1001 1001 1111"),
  ],
)
def test_regions(bert, hide, keep, expected):
  known = known_of(bert, hide=hide, keep=keep)
  assert " ".join("".join(str(int(pixel)) for pixel in row) for row in known) == expected


def test_a_picture_of_a_mask(bert, tmp_path):
  mask = np.zeros((40, 40), np.uint8)
  mask[20:, :10] = 255
  Image.fromarray(mask).save(tmp_path / "mask.png")
  known = known_of(bert, hide=str(tmp_path / "mask.png"))
  assert not known[2:, 0].any() and known.sum() == 14
  for value, word in ((0, "dark"), (255, "light")):
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(UserError, match=f"is {word} all over"):
      known_of(bert, hide=str(tmp_path / "flat.png"))
  (tmp_path / "torn.png").write_bytes((tmp_path / "mask.png").read_bytes()[:40])
  with pytest.raises(
    UserError, match=r"config\.complete\.hide: .*torn\.png: unreadable image \(.*expected an image"
  ):
    known_of(bert, hide=str(tmp_path / "torn.png"))
  with pytest.raises(
    UserError, match=r"config\.complete\.hide: 'middle'; expected one of lower, upper"
  ):
    known_of(bert, hide="middle")


def test_a_mask_is_cropped_as_the_image_it_belongs_to(bert, tmp_path):
  """The same square of both, the same way up, whatever their format."""
  wide = np.zeros((40, 100), np.uint8)
  wide[:, 30:50] = 255  # the left half of the centre
  expected = known_of(bert, hide="left")
  deep = wide.astype(np.uint16) * 200  # 51,000 of 65,535 is light, 12,750 is dark
  deep[wide == 0] = 12_750
  see_through = np.stack([np.zeros_like(wide), 255 - wide], -1)  # black, or transparent
  lying = Image.Exif()
  lying[0x0112] = 6
  for name, mask, options in (
    ("wide.png", wide, {}),
    ("deep.png", deep, {}),
    ("deep.tif", deep, {}),
    ("see_through.png", see_through, {}),
    ("lying.png", np.rot90(wide), {"exif": lying}),
    ("lying.tif", np.rot90(wide), {"exif": lying}),
    ("own.png", np.where(expected, 0, 255).astype(np.uint8), {}),
  ):
    Image.fromarray(np.ascontiguousarray(mask)).save(tmp_path / name, **options)
    known = known_of(bert, hide=str(tmp_path / name))
    np.testing.assert_array_equal(known, expected, err_msg=name)


def test_raster_order_cannot_condition_on_what_comes_after(tmp_path):
  causal = own_checkpoint.write(tmp_path / "causal")
  with pytest.raises(UserError, match=r"config\.complete\.hide: left.*raster order.*fix: "):
    known_of(causal, hide="left")


def filler_of(bert, mesh, **changes):
  config = settings(bert, **changes)
  found = completer.describe(config, "", bert=True)
  return filler.Filler(found, config, mesh)


def some_pictures(n):
  rng = np.random.default_rng(0)
  return [completer.InputImage(str(i), rng.integers(0, 11, 16).astype(np.int32)) for i in range(n)]


def test_a_sample_is_the_same_in_any_batch_and_on_any_mesh(bert):
  given = some_pictures(3)
  mask = known_of(bert, hide="left")
  known = mask.reshape(-1)
  (together,) = filler_of(bert, tiny.mesh_of((2, 2, 2))).draw(given, [0, 1], mask, DRAW, seed=3)
  assert together.tokens.shape == (6, 16)
  one = filler_of(bert, tiny.mesh_of())
  for i, picture in enumerate(given):
    for number in (0, 1):
      (alone,) = one.draw([picture], [number], mask, DRAW, seed=3)
      np.testing.assert_array_equal(alone.tokens[0], together.tokens[2 * i + number])
      np.testing.assert_array_equal(alone.tokens[0][known], picture.tokens[known])
      assert (alone.nll[0][known] == 0).all() and (alone.nll[0][~known] > 0).all()
  assert (together.tokens[0] != together.tokens[1]).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_one_program_serves_all_that_is_asked_for_while_one_watches(bert, shape):
  """Any region, number of passes, way of drawing, and number of samples up to a bucket."""
  filled, (picture,) = filler_of(bert, tiny.mesh_of(shape)), some_pictures(1)
  asked = [("left", 4, 3, DRAW), ("upper", 3, 5, SamplingConfig(0.0)), ("centre", 2, 1, DRAW)]
  drawn = []
  with compilations() as found:
    for hide, n, passes, way in asked:
      mask, options = known_of(bert, hide=hide), dict(seed=2, passes=passes)
      drawn.append(list(filled.draw([picture], range(n), mask, way, **options, watched=True)))
  assert found["begin"] == found["extend"] == 1
  for (hide, n, passes, way), seen in zip(asked, drawn, strict=True):
    mask = known_of(bert, hide=hide)
    (alone,) = filled.draw([picture], range(n), mask, way, seed=2, passes=passes)
    np.testing.assert_array_equal(seen[-1].tokens, alone.tokens)
    assert len(seen) == passes and len(alone.tokens) == n
    for before, after in itertools.pairwise(seen):
      assert (after.settled >= before.settled).all() and not before.tokens[~before.settled].any()


def test_the_job(bert, tmp_path):
  rng = np.random.default_rng(0)
  for name in "ab":
    noise = rng.integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"{name}.png")
  out = tmp_path / "out"
  complete.run(settings(bert, images=str(tmp_path / "*.png"), hide="upper", keep=0.25), str(out))
  values = json.loads((out / "complete.json").read_text())
  assert values["pictures"] == 2 and values["settings"]["passes"] == 3
  assert values["settings"]["known"] == ["0000", "0000", "0000", "1111"]
  assert values["nats_per_token"] > 0
  assert (out / "a" / "0001.png").exists() and not (out / "a" / "appearing.gif").exists()
  grid = np.asarray(Image.open(out / "grid.png"))
  cell = grid[-132:, 4:132]  # the last row's first image
  assert (cell[: 128 * 3 // 4] == 200).all()  # the upper rows of what is given are hidden
  with pytest.raises(UserError, match="drawn in another way"):
    complete.run(settings(bert, images=str(tmp_path / "*.png"), hide="left"), str(out))
  complete.run(settings(bert), str(tmp_path / "nothing"))  # from nothing
  drawn = json.loads((tmp_path / "nothing" / "complete.json").read_text())
  assert drawn["pictures"] == 0 and len(drawn["each_nats_per_token"]) == 1
