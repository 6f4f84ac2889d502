"""Which of a fine-tuning's checkpoints is the best, and how long none has been better."""

from igpt_jax.jobs.finetune import SCORE, Best


def test_the_first_of_equals_is_the_best():
  best = Best()
  for step, accuracy in ((10, 0.5), (20, 0.7), (30, 0.7), (40, 0.6)):
    best.update(step, accuracy)
  assert (best.step, best.accuracy, best.waited) == (20, 0.7, 2)
  assert best.scores_of(40) == {SCORE: 0.6} and best.scores_of(30) is None
  best.update(50, 0.8)
  assert (best.step, best.waited) == (50, 0)


def test_the_best_is_one_that_is_there():
  best = Best(step=20, accuracy=0.7)
  best.keep_to({10: 0.5, 20: 0.7, 30: None})
  assert best.step == 20
  best.keep_to({10: 0.6, 30: 0.6, 40: None})
  assert (best.step, best.accuracy) == (10, 0.6)
  best.keep_to({40: None})
  assert (best.step, best.accuracy) == (0, -1.0)
