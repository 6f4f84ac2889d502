"""When a run is evaluated."""

from igpt_jax.runner.loop import Work


def work(eval_every, evaluate=lambda state, through: {}):
  return Work(
    train_step=lambda state, batch: (state, {}),
    batches=lambda step: None,
    fields=(),
    batch_size=1,
    log_every=1,
    eval_every=eval_every,
    save_every=1,
    describe=lambda step: {},
    evaluate=evaluate,
  )


def test_when_it_evaluates():
  def steps(work):
    return [step for step in range(1, 11) if work.evaluates_at(step, 10)]

  assert steps(work(4)) == [4, 8, 10]
  assert steps(work(5)) == [5, 10]
  assert steps(work(0)) == [10]
  assert steps(work(4, None)) == []  # there is nothing to evaluate on
