"""Small mistakes, each with the tests that must see it; `tests/mutations.py` tries them."""

from support.mutations import (
  checkpoint,
  data,
  drawing,
  elsewhere,
  model,
  pretrained,
  probing,
  runner,
  training,
)

ALL = (
  *model.MUTATIONS,
  *drawing.MUTATIONS,
  *training.MUTATIONS,
  *data.MUTATIONS,
  *probing.MUTATIONS,
  *checkpoint.MUTATIONS,
  *runner.MUTATIONS,
  *pretrained.MUTATIONS,
  *elsewhere.MUTATIONS,
)
