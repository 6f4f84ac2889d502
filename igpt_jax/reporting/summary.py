"""Results of jobs: JSON files of numbers, and one summary of all of them.

Every write is atomic: a reader sees the old file or the new one.
"""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from igpt_jax import files
from igpt_jax.units import significant

_PROBING = {
  "best_layer": "best layer {}", "test_accuracy": "test accuracy {:.2%}", "verdict": "{}"
}  # fmt: skip
_FINETUNING = {
  "steps": "{:,} steps",
  "classes": "{} classes",
  "test_accuracy": "test accuracy {:.2%}",
  "test_accuracy_of_mean": "({:.2%} by the mean of logits)",
  "test_nats_per_token": "{:.4f} nats/token",
  "start_nats_per_token": "{:.4f} before",
}

# file that a job writes -> (heading, {key: format, or function to text} of the values to show)
_SECTIONS: dict[str, tuple[str, Mapping[str, str | Callable[[Any], str]]]] = {
  "training.json": (
    "Pretraining",
    {
      "parameters": "{:,} parameters",
      "step": "{:,} steps",
      "loss": "last training loss {:.4f} nats/token",
      "validation_loss": "validation {:.4f} nats/token",
      "validation_bits_per_dim": "({:.4f} bits/dim)",
      "validation_gap": "{:+.4f} from the mean of the last training losses",
      "images_per_second": lambda speed: f"{significant(speed)} images/s in the last interval",
      "elapsed_seconds": "{:,.0f} s in all",
      "goodput": "goodput {:.1%}",
    },
  ),
  "evaluation.json": (
    "Likelihood",
    {
      "images": "{:,} images",
      "nats_per_token": "model {:.4f} nats/token",
      "bits_per_token": "({:.4f} bits/token)",
      "bits_per_dim": "({:.4f} bits/dim)",
      "uniform": "uniform {:.4f}",
      "unigram": "unigram {:.4f}",
      "position_unigram": "per-position unigram {:.4f}",
      "below_position_unigram": "{:.1%} below the per-position unigram",
    },
  ),
  "probe.json": ("Linear probe", _PROBING),
  "probe_attentive.json": ("Attentive probe", _PROBING),
  "lowdata.json": ("Few labels", {"verdict": "{}"}),
  "finetune/finetune.json": ("Fine-tuning", _FINETUNING),
  "finetune_scratch/finetune.json": ("The same from random parameters", _FINETUNING),
  "quality.json": (
    "Quality",
    {
      "samples_distance": "Fréchet distance to test of samples {:.4g}",
      "completions_distance": "of completions {:.4g}",
      "train_distance": "of training images {:.4g}",
      "network": "by {}",
    },
  ),
  "sample.json": (
    "Samples",
    {
      "samples_nats_per_token": "samples' own {:.4f} nats/token",
      "completions_nats_per_token": "completions' own {:.4f} nats/token",
      "pictures": "{}",
    },
  ),
}


def write_text(path: str, text: str) -> None:
  with files.replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
    file.write(text)


def write_json(path: str, values: Mapping[str, Any]) -> None:
  write_text(path, json.dumps(values, indent=2) + "\n")


def write_summary(workdir: str) -> str:
  """Writes all jobs' results to summary.md, and returns its text.

  If the results aren't all of the newest checkpoint, each line names its checkpoint.
  """
  kept: dict[str, dict[str, Any]] = {}
  texts: dict[str, str] = {}
  for name, (_, shown) in _SECTIONS.items():
    try:
      values = files.read_json(os.path.join(workdir, name))
      texts[name] = _numbers(values, shown)
      kept[name] = values
    except FileNotFoundError:
      continue
    except (ValueError, TypeError) as error:
      texts[name] = f"{name} is damaged ({error}); fix: run that job again"
  whose = _whose(kept)
  lines = [f"- **{_SECTIONS[name][0]}**{whose.get(name, '')}: {of}" for name, of in texts.items()]
  text = "\n".join([f"# {os.path.basename(os.path.abspath(workdir))}", "", *lines]) + "\n"
  write_text(os.path.join(workdir, "summary.md"), text)
  return text


def _numbers(values: Mapping[str, Any], shown: Mapping[str, str | Callable[[Any], str]]) -> str:
  numbers = ", ".join(
    form.format(values[key]) if isinstance(form, str) else form(values[key])
    for key, form in shown.items()
    if values.get(key) is not None
  )
  return numbers.replace(", (", " (")


def _whose(kept: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
  """Maps files to the checkpoints of their results, in words; {} if all are of the newest."""
  of_checkpoint = {
    name: (values.get(f"{start}step"), values.get(f"{start}parameters"))
    for name, values in kept.items()
    for start in ["start_" if name.startswith("finetune/") else ""]
    if name not in ("training.json", "finetune_scratch/finetune.json")
  }
  steps = {step for step, _ in of_checkpoint.values()}
  if "training.json" in kept:
    steps.add(kept["training.json"].get("step"))
  digests = {parameters for _, parameters in of_checkpoint.values()}
  if len(steps - {None}) <= 1 and len(digests) <= 1:
    return {}
  return {
    name: f" (step {step}, parameters {parameters[:8]})" if parameters else " (an older version's)"
    for name, (step, parameters) in of_checkpoint.items()
  }
