"""Whether the best learning rate of a narrow model is that of wider ones, on digits at 8 × 8.

  JAX_PLATFORMS=cpu python tests/benchmarks/rate_transfer.py --workdir runs/rate_transfer

Two layers of width 64, 128 and 256 with heads of 16, by Adam and by Muon, in the standard
parametrisation and in CompleteP with width 64 as its base; one seed. Every image is seen once at most,
so that the loss is that of images not seen yet: the mean of the last fifth of the steps, in nats per
token. Writes sweep.json after every run, from which it goes on when it is called again, and sweep.md.
About 12 minutes of one core.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1]))

from igpt_jax.reporting.tables import markdown_table
from support import rates

WIDTHS = (64, 128, 256)
RATES = {
  "adam": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3),
  "muon": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3),
}


def table(results: dict[str, float], optimizer: str, steps: int) -> str:
  """Returns the losses of an optimizer's runs; each row's best is bold."""
  rows = []
  for kind in ("standard", "complete_p"):
    for width in WIDTHS:
      losses = [results.get(f"{optimizer} {kind} {width} {rate:g}") for rate in RATES[optimizer]]
      best = min((loss for loss in losses if loss is not None and loss == loss), default=None)
      cells = [
        "" if loss is None else f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"
        for loss in losses
      ]
      rows.append((kind, str(width), *cells))
  head = ("parametrisation", "width", *(f"{rate:g}" for rate in RATES[optimizer]))
  title = f"{optimizer}, {steps} steps, by learning rate:\n\n"
  return title + markdown_table("lr" + "r" * len(RATES[optimizer]), head, rows)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/rate_transfer")
  parser.add_argument("--steps", type=int, default=120)
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--optimizers", default="adam,muon")
  given = parser.parse_args()
  given.workdir.mkdir(parents=True, exist_ok=True)
  path = given.workdir / "sweep.json"
  results = json.loads(path.read_text()) if path.exists() else {}
  optimizers = given.optimizers.split(",")
  for optimizer in optimizers:
    for width in WIDTHS:
      for kind in ("complete_p", "standard"):
        if kind == "standard" and width == rates.BASE_EMBD:  # the same, bit for bit
          for rate in RATES[optimizer]:
            results[f"{optimizer} {kind} {width} {rate:g}"] = results[
              f"{optimizer} complete_p {width} {rate:g}"
            ]
          continue
        for rate in RATES[optimizer]:
          name = f"{optimizer} {kind} {width} {rate:g}"
          if name in results:
            continue
          _, _, losses = rates.trained(
            rates.config_of(kind, width), rate, given.steps, given.batch_size,
            optimizer=optimizer, warmup_steps=given.steps // 10,
          )  # fmt: skip
          results[name] = float(losses[-given.steps // 5 :].mean())
          path.write_text(json.dumps(results, indent=1))
          print(name, f"{results[name]:.4f}", flush=True)
  tables = [table(results, optimizer, given.steps) for optimizer in optimizers]
  (given.workdir / "sweep.md").write_text("\n\n".join(tables) + "\n")
  print("\n\n".join(tables))


if __name__ == "__main__":
  main()
