"""Job first_contact reports what it says, goes on, and names nobody; how fast anything is, is not tested."""

import dataclasses
import getpass
import json
import os
import socket
import time

import jax
import pytest

from igpt_jax.errors import UserError
from igpt_jax.jobs import first_contact
from igpt_jax.parallel import hardware
from igpt_jax.timing import contact_parts
from igpt_jax.timing.contact_parts import Part, Record
from igpt_jax.training.compilation import flops_per_image
from igpt_jax.workspace import forecast_apart, measurements
from igpt_jax.workspace.forecast_apart import OutOfTime
from support.paths import ROOT
from support.tiny import changed, settings_of

pytestmark = pytest.mark.usefixtures("quick_compile")

TINY = {
  "job": "first_contact", "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16,
  "benchmark.repeats": 2, "benchmark.samples": 3, "benchmark.images": 20,
  "train.batch_size": 16,
}  # fmt: skip
MACHINE = {
  "machine": {"device": "TPU v5 lite", "devices": 8, "hosts": 1, "processor": "?", "cores": 8},
  "versions": {}, "environment": {},
}  # fmt: skip
TIMES = {"seconds": 0.25, "fastest": 0.2, "slowest": 0.5, "repeats": 5, "calls": 1}


def asking(**changes):
  own = {f"first_contact.{name}": value for name, value in changes.items()}
  return settings_of(changes=TINY | own)


def report_in(folder):
  report = json.loads((folder / "first_contact.json").read_text())
  return report, (folder / "first_contact.md").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """All parts of the quickstart's config, made tiny, on eight virtual devices."""
  workdir = tmp_path_factory.mktemp("contact")
  first_contact.run(asking(), str(workdir))
  return workdir, *report_in(workdir)


def test_the_report_says_what_was_measured_on_what(whole):
  _, report, text = whole
  assert list(report["parts"]) == [
    "quickstart: training", "quickstart: sampling", "quickstart: input",
  ]  # fmt: skip
  assert {part["state"] for part in report["parts"].values()} == {"measured"}
  machine = report["about"]["machine"]
  assert machine["device"] == "cpu" and machine["devices"] == jax.device_count()
  assert (machine["hosts"], machine["driver"]) == (1, "cpu")
  assert report["about"]["versions"].keys() >= {"jax", "jaxlib", "igpt_jax", "source"}
  of_it = report["configs"]["quickstart"]
  assert (of_it["n_layer"], of_it["n_embd"], of_it["n_positions"]) == (1, 16, 64)
  assert of_it["mesh"] == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
  assert (of_it["batch_size"], of_it["dtype"]) == (16, "float32")
  assert report["note"] == "CPU: relative use only" and "relative use only" in text
  trained = report["parts"]["quickstart: training"]["values"]
  assert of_it["model_flops_per_step"] == 16 * trained["flops_per_image"]
  assert trained["images_per_second"] == pytest.approx(16 / trained["step"]["seconds"])
  assert trained["step"]["repeats"] == 2 and trained["mfu"] is None
  assert report["parts"]["quickstart: sampling"]["values"]["samples"] == 8  # eight devices
  read = report["parts"]["quickstart: input"]["values"]
  assert "made JPEGs of 500×375" in read["data"]
  assert read["times_training"] == pytest.approx(
    read["pictures_per_second"] / trained["images_per_second"]
  )
  for words in (
    "| quickstart: training step, batch 16 |", "| quickstart: sampling 8 images, data 8 × fsdp 1 × tensor 1 |",
    "to work in per device, as compiled", "64 JPEGs of 109 kB on average, made from random numbers",
  ):  # fmt: skip
    assert words in text


def test_a_second_start_measures_nothing_again(whole, monkeypatch, capsys):
  workdir, report, text = whole
  monkeypatch.setattr(first_contact, "_MEASURES", {})
  first_contact.run(asking(), str(workdir))
  assert report_in(workdir) == (report, text)
  assert capsys.readouterr().out.count("kept from an earlier start") == 3


@pytest.fixture
def stand_ins(monkeypatch):
  """Measurements that take no time; a test replaces some. The parts that were asked for."""
  asked = []

  def measure(kind):
    def measured(subject, record, until):
      asked.append(f"{subject.name} {kind}")
      return {
        "samples": 8,
        "mesh": {"data": 1},
        "all_samples": TIMES,
        "samples_per_second": 1.0,
        "tokens_per_second": 2.0,
      }

    return measured

  made = {kind: measure("sampling") for kind in contact_parts.KINDS}
  monkeypatch.setattr(first_contact, "_MEASURES", made)
  return made, asked


def both(**changes):
  """Two configs, of which only sampling is asked for."""
  return asking(configs=("quickstart", "cifar10_16"), parts=("sampling",), **changes)


def test_a_failing_part_is_a_line_and_the_rest_goes_on(tmp_path, stand_ins, monkeypatch):
  made, asked = stand_ins
  monkeypatch.setattr(socket, "gethostname", lambda: "boreas")
  monkeypatch.setattr(getpass, "getuser", lambda: "wilhelmina")
  measure = made["sampling"]

  def sampling(subject, record, until):
    if subject.name == "quickstart":
      assert report_in(tmp_path)[0]["begun"].keys() == {"quickstart: sampling"}
      where = f"in {ROOT}/igpt_jax/x.py and {tmp_path}/y of wilhelmina, on boreas"
      raise jax.errors.JaxRuntimeError(f"INTERNAL: no such kernel {where} | 2\nmore lines")
    report = report_in(tmp_path)[0]  # is on disk before the next part begins
    assert report["parts"]["quickstart: sampling"]["state"] == "failed"
    return measure(subject, record, until)

  made["sampling"] = sampling
  first_contact.run(both(), str(tmp_path))
  report, text = report_in(tmp_path)
  failed = report["parts"]["quickstart: sampling"]
  assert failed["reason"] == (
    "JaxRuntimeError: INTERNAL: no such kernel in <path> and <path> of <name>, on <name> ¦ 2"
  )
  assert f"| quickstart: sampling |  |  |  | failed: {failed['reason']} |" in text
  assert report["parts"]["cifar10_16: sampling"]["state"] == "measured" and report["begun"] == {}
  for secret in ("boreas", "wilhelmina", str(ROOT), str(tmp_path), os.path.expanduser("~")):
    assert secret not in text and secret not in json.dumps(report), secret
  made["sampling"] = measure
  first_contact.run(both(), str(tmp_path))  # a failure may be mended: it is tried again
  assert asked == ["cifar10_16 sampling", "quickstart sampling"]


def test_what_does_not_fit_is_told_from_failures_and_never_run(tmp_path, monkeypatch):
  monkeypatch.setattr(hardware, "memory_bytes", lambda device: 4_000.0)
  monkeypatch.setattr(measurements, "training", lambda *args: pytest.fail("it was run"))
  first_contact.run(asking(parts=("training",)), str(tmp_path))
  report, text = report_in(tmp_path)
  part = report["parts"]["quickstart: training"]
  assert part["state"] == "doesn't fit" and part["values"] == {}
  assert "take" in part["reason"] and "of each device to train" in part["reason"]
  assert "| quickstart: training |  |  |  | doesn't fit: model: " in text


def test_parts_without_time_are_left_out_and_done_by_the_next_start(tmp_path, stand_ins):
  made, asked = stand_ins
  measure = made["sampling"]

  def slow(subject, record, until):
    time.sleep(max(until - time.monotonic(), 0))
    return measure(subject, record, until)

  made["sampling"] = slow
  first_contact.run(both(minutes=0.02), str(tmp_path))
  report, text = report_in(tmp_path)
  assert report["parts"]["quickstart: sampling"]["state"] == "measured"
  left_out = report["parts"]["cifar10_16: sampling"]
  assert left_out["state"] == "left out" and "the same command goes on" in left_out["reason"]
  assert "| cifar10_16: sampling |  |  |  | left out: no time" in text
  made["sampling"] = measure
  first_contact.run(both(), str(tmp_path))
  assert asked == ["quickstart sampling", "cifar10_16 sampling"]
  assert report_in(tmp_path)[0]["parts"]["cifar10_16: sampling"]["state"] == "measured"


def test_a_forecast_without_time_is_left_out(tmp_path, stand_ins):
  made, _ = stand_ins

  def late(subject, record, until):
    raise OutOfTime

  made["sampling"] = late
  first_contact.run(both(), str(tmp_path))
  states = {part["state"] for part in report_in(tmp_path)[0]["parts"].values()}
  assert states == {"left out"}


def test_a_forecast_that_fails_says_why_in_a_line(monkeypatch):
  settings = changed(
    settings_of(), {"job": "compile", "mesh.slices": 0, "compile.topology": "v5e:4x4"}
  )
  with pytest.raises(
    UserError, match=r"job compile ended with status 2: igpt_jax: .*mesh\.slices: 0"
  ):
    forecast_apart.run_job(settings, time.monotonic() + 300)


def test_a_forecast_stands_beside_its_measurement(tmp_path, monkeypatch):
  """What job compile is asked for, and what the table makes of it; tests/tpu_compile has the real one."""
  asked = []

  def run_job(settings, until):
    asked.append(settings)
    return {"step_seconds": 0.2, "step_parts": {}, "mfu": 0.4, "bytes_per_device": {}, "days": 1.0}

  monkeypatch.setattr(forecast_apart, "run_job", run_job)
  monkeypatch.setattr(hardware, "topology_of", lambda devices: "v5e:2x4")
  subject = first_contact.subjects_of(asking())["quickstart"]
  part, drawn = Part("training", "quickstart"), Part("forecast", "quickstart")
  record = Record(str(tmp_path), MACHINE, {part: "trained", drawn: "forecast"})
  with pytest.raises(first_contact.NothingToCompare):
    first_contact._forecast(subject, record, 0.0)
  trained = {"accumulate": 4, "step": {"seconds": 0.25}, "peak_bytes_per_device": None}
  record.entries[part.name] = {
    "kind": "training", "config": "quickstart", "state": "measured", "values": trained,
  }  # fmt: skip
  values = first_contact._forecast(subject, record, 0.0)
  assert "days" not in values and values["accumulate"] == 4
  (settings,) = asked
  assert (settings.job, settings.compile.topology) == ("compile", "v5e:2x4")
  assert (settings.train.accumulate, settings.sample.samples) == (4, 0)
  computed = {"dtype": "float32", "remat": subject.model.remat}
  assert settings.model == dataclasses.replace(subject.settings.model, **computed)
  monkeypatch.setattr(contact_parts.contact_tables, "as_markdown", str)
  record.finish(drawn, "measured", values=values)
  ratio = "measured_over_forecast"
  assert record.as_json()["parts"][drawn.name]["values"][ratio] == 1.25
  trained["step"]["seconds"] = 0.5  # measured anew: the ratio follows
  assert record.as_json()["parts"][drawn.name]["values"][ratio] == 2.5 and record.settled(drawn)
  trained["accumulate"] = 2
  assert record.as_json()["parts"][drawn.name]["values"][ratio] is None
  assert not record.settled(drawn)
  del record.entries[part.name]
  monkeypatch.undo()
  record.write()
  assert "| quickstart: forecast of the training step | 200 ms |" in report_in(tmp_path)[1]


def test_parts_that_are_not_asked_for_go_with_their_old_settings(tmp_path):
  first_contact.run(asking(parts=("training", "sampling")), str(tmp_path))
  changed_model = TINY | {"first_contact.parts": ("training",), "model.remat": "full"}
  first_contact.run(settings_of(changes=changed_model), str(tmp_path))
  report, _ = report_in(tmp_path)
  assert list(report["parts"]) == ["quickstart: training"]
  assert report["configs"]["quickstart"]["remat"] == "full"


def test_a_changed_setting_or_source_is_measured_anew(tmp_path, stand_ins, monkeypatch, capsys):
  _, asked = stand_ins
  first_contact.run(both(), str(tmp_path))
  first_contact.run(settings_of(changes=TINY | {
    "first_contact.configs": ("quickstart", "cifar10_16"), "first_contact.parts": ("sampling",),
    "model.remat": "full",
  }), str(tmp_path))  # fmt: skip
  assert asked == ["quickstart sampling", "cifar10_16 sampling"] * 2
  assert "measured anew, since settings have changed: quickstart: " in capsys.readouterr().out
  assert report_in(tmp_path)[0]["configs"]["quickstart"]["remat"] == "full"
  monkeypatch.setattr(first_contact.versions, "source_digest", lambda: "another")
  first_contact.run(both(), str(tmp_path))
  assert len(asked) == 6 and "another machine or other versions" in capsys.readouterr().out
  assert len(list(tmp_path.glob("first_contact-*.json"))) == 1


def test_a_part_that_ended_the_process_twice_is_a_line(tmp_path, stand_ins):
  made, asked = stand_ins
  measure = made["sampling"]

  class Ended(BaseException):
    """Stands for the end of the process."""

  def end(subject, record, until):
    if subject.name == "quickstart":
      raise Ended
    return measure(subject, record, until)

  made["sampling"] = end
  for _ in range(2):
    with pytest.raises(Ended):
      first_contact.run(both(), str(tmp_path))
  first_contact.run(both(), str(tmp_path))
  report, _ = report_in(tmp_path)
  assert report["parts"]["quickstart: sampling"]["state"] == "failed"
  assert "ended the process" in report["parts"]["quickstart: sampling"]["reason"]
  assert asked == ["cifar10_16 sampling"]


def test_a_signal_keeps_what_was_measured(tmp_path, stand_ins):
  made, _ = stand_ins
  words = []

  def told_to_stop(subject, record, until):
    words.append(first_contact.stopping._answer("SIGTERM"))
    raise KeyboardInterrupt

  for _ in range(3):
    made["sampling"] = told_to_stop
    with pytest.raises(KeyboardInterrupt):
      first_contact.run(both(), str(tmp_path))
  assert words[0].startswith("stopped by SIGTERM: what was measured is kept")
  assert report_in(tmp_path)[0]["begun"] == {}
  assert "nothing to save" in first_contact.stopping._answer("SIGTERM")  # as before the job


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"configs": ("quickstar",)}, r"config\.first_contact\.configs: 'quickstar'.*fix: quickstart"),
    ({"configs": ("quickstart", str(ROOT / "configs" / "quickstart.py"))}, "two are called 'quick"),
    ({"parts": ("forecast",)}, "there is no TPU here"),
  ],
)
def test_a_mistake_is_told_before_anything_is_measured(tmp_path, stand_ins, changes, message):
  with pytest.raises(UserError, match=message):
    first_contact.run(asking(**changes), str(tmp_path))
  assert not list(tmp_path.iterdir()) and not stand_ins[1]


def test_a_batch_that_does_not_divide_is_a_line(tmp_path):
  settings = settings_of(
    changes=TINY | {"train.batch_size": 17, "first_contact.parts": ("training",)}
  )
  first_contact.run(settings, str(tmp_path))
  part = report_in(tmp_path)[0]["parts"]["quickstart: training"]
  assert part["state"] == "failed" and "train.batch_size: 17 isn't divisible" in part["reason"]


def test_on_accelerators_the_papers_configs_are_measured(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  found = first_contact.subjects_of(settings_of(changes={"job": "first_contact"}))
  assert list(found) == ["imagenet32_s", "imagenet32_m", "imagenet32_l"]
  model = found["imagenet32_l"].model
  assert (model.n_layer, model.n_embd, model.n_positions, model.n_vocab) == (48, 1536, 1024, 512)
  assert model.dtype == "bfloat16" and found["imagenet32_l"].settings.train.batch_size == 128
  described = found["imagenet32_s"].described()
  assert described["parameters"] == 76_571_648
  assert described["model_flops_per_step"] == 128 * flops_per_image(found["imagenet32_s"].model)
  kinds = first_contact.kinds_here(settings_of(changes={"job": "first_contact"}))
  assert kinds == ["training", "sampling", "input"]
