"""How often a compiled program runs each kind of collective."""

from igpt_jax.prediction.hlo import Program
from igpt_jax.prediction.schedule import COLLECTIVES, Links, predict, replica_group


def count(program: Program) -> dict[str, int]:
  """Collectives by kind; one that is begun and ended apart counts once."""
  named = [
    device
    for operations in program.computations.values()
    for operation in operations
    if operation.opcode.removesuffix("-start") in COLLECTIVES
    for device in replica_group(operation.attributes, 1)
  ]
  links = Links(1.0, ((0,),) * (1 + max(named, default=0)), (False,))
  nothing = predict(program, clock=1.0, links=links, kernel_cycles=lambda operation: 0.0)
  return {kind: total.count for kind, total in sorted(nothing.collectives.items())}
