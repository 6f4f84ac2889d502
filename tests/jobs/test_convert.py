"""Foreign checkpoints in every job: converted, evaluated, sampled, probed, trained from.

Tiny weights that the tests write themselves, and the golden ones of the original code where they
are; the numbers come from `numpy_reference` and from the original.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.config.fields import Settings, as_json, base
from igpt_jax.errors import UserError
from igpt_jax.jobs import convert, download, evaluate, pretrain, probe, sample
from igpt_jax.pretrained import formats
from igpt_jax.pretrained.tensor_bundle import Bundle, write_bundle
from igpt_jax.reporting import metrics
from igpt_jax.workspace import weights
from support import golden_files, numpy_reference
from support.blob_store import BlobStore
from support.loopback import serving
from support.paths import ROOT
from support.quickstart import load_config
from support.tiny import changed, settings_of

pytestmark = pytest.mark.usefixtures("quick_compile")


SIZES = dict(n_layer=2, n_head=2, n_embd=16, n_vocab=17, n_positions=64)
STEP = 700
CLUSTERS = np.linspace(-1, 1, 3 * 17, dtype=np.float32).reshape(17, 3)
TOKENS = np.random.default_rng(1).integers(0, 17, (5, 64)).astype(np.uint16)


def write_tiny(folder, *, causal=True, palette=True, num_shards=3, n_layer=2):
  """An OpenAI checkpoint's prefix, and its variables."""
  variables = numpy_reference.random_variables(3, causal=causal, **SIZES | {"n_layer": n_layer})
  folder.mkdir(parents=True, exist_ok=True)
  prefix = folder / f"model.ckpt-{STEP}"
  write_bundle(prefix, variables.items(), num_shards=num_shards)
  if palette:
    np.save(folder / "kmeans_centers.npy", CLUSTERS)
  return prefix, variables


def variables_of(prefix):
  with Bundle(prefix) as bundle:
    return {name: bundle.read(name) for name in bundle.entries}


def assert_same_variables(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert found[name].dtype == value.dtype, name
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def settings(name="quickstart", **overrides):
  """A config with nothing of its own about the model, as a person with a checkpoint has it."""
  config = load_config(name) if name != "base" else base()
  return settings_of(config, {key.replace("__", "."): v for key, v in overrides.items()})


def run(job, config, workdir="unused"):
  """Runs the job as `main` does."""
  job.run(config, str(workdir))


def convert_to(kind, source, target):
  run(
    convert,
    settings(
      "convert", convert__source=str(source), convert__target=str(target), convert__format=kind
    ),
  )
  return target


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """The same tiny weights in every format, with their palette: name -> path."""
  folder = tmp_path_factory.mktemp("tiny")
  prefix, _ = write_tiny(folder / "openai")
  return {
    "openai": prefix,
    "orbax": convert_to("orbax", prefix, folder / "workdir"),
    "huggingface": convert_to("huggingface", prefix, folder / "hf"),
    "safetensors": convert_to("safetensors", prefix, folder / "one" / "m.safetensors"),
  }


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
  """The same without a palette."""
  folder = tmp_path_factory.mktemp("bare")
  prefix, _ = write_tiny(folder / "openai", palette=False)
  return {"openai": prefix, "huggingface": convert_to("huggingface", prefix, folder / "hf")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A folder of 8×8 images of two classes."""
  root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
  for split, count in (("train", 24), ("test", 8)):
    for label, name in enumerate(("dark", "light")):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(128 * label, 128 + 128 * label, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / name / f"{i}.png")
  return {"data__name": "folder", "data__path": str(root), "data__resolution": 8}


# --- conversion ------------------------------------------------------------------------------------


@pytest.fixture(params=["tiny", "golden a16"])
def source(request, tmp_path):
  """An OpenAI checkpoint, its variables, some tokens and their loss by someone else's code."""
  if request.param == "tiny":
    prefix, variables = write_tiny(tmp_path / "source")
    return prefix, TOKENS, numpy_reference.forward(variables, TOKENS)["per_image"].mean()
  prefix = golden_files.golden("a16", "openai", "model.ckpt-1000")
  tokens = golden_files.arrays("a16", "inputs.npz")["tokens"]
  return prefix, tokens, golden_files.arrays("a16", "outputs_openai.npz")["gen_loss"]


def test_round_trip_is_bit_exact_and_every_format_evaluates_alike(source, tmp_path, capsys):
  prefix, tokens, loss = source
  checkpoints = [prefix]
  kinds = "orbax huggingface openai safetensors orbax openai huggingface safetensors openai".split()
  for i, kind in enumerate(kinds):
    target = tmp_path / f"{i}" / (f"model.ckpt-{STEP}" if kind == "openai" else kind)
    checkpoints.append(convert_to(kind, checkpoints[-1], target))
    assert str(target) in capsys.readouterr().out
  for back in (checkpoints[3], checkpoints[6], checkpoints[9]):
    assert_same_variables(variables_of(back), variables_of(prefix))
    palette, original = back.parent / "kmeans_centers.npy", prefix.parent / "kmeans_centers.npy"
    assert palette.exists() == original.exists()
    if original.exists():
      np.testing.assert_array_equal(np.load(palette), np.load(original))

  np.save(tmp_path / "tokens.npy", tokens)
  for i, path in enumerate([*checkpoints[:3], checkpoints[4]]):
    config = settings(
      "openai_s_eval",
      checkpoint=str(path),
      data__path=str(tmp_path / "tokens.npy"),
      data__resolution=round(tokens.shape[1] ** 0.5),
      evaluate__batch_size=8,
    )
    run(evaluate, config, tmp_path / f"evaluated{i}")
    values = json.loads((tmp_path / f"evaluated{i}" / "evaluation.json").read_text())
    assert values["nats_per_token"] == pytest.approx(float(loss), abs=1e-5)
    assert (values["images"], values["objective"]) == (len(tokens), "autoregressive")


def test_bert_goes_everywhere_but_to_hugging_face(tmp_path):
  prefix, variables = write_tiny(tmp_path / "source", causal=False)
  workdir = convert_to("orbax", prefix, tmp_path / "workdir")
  found = checkpoint.describe(str(workdir))
  assert (found.step, found.config.causal, found.run["objective"]) == (STEP, False, "masked")
  back = convert_to("openai", workdir, tmp_path / "back" / "model.ckpt-1")
  assert_same_variables(variables_of(back), variables)
  with pytest.raises(UserError, match=r"huggingface.*BERT"):
    convert_to("huggingface", workdir, tmp_path / "hf")

  np.save(tmp_path / "tokens.npy", TOKENS)
  found = []
  for path in (prefix, workdir):
    config = settings("openai_s_eval", checkpoint=str(path), data__path=f"{tmp_path}/tokens.npy")
    changes = {"data.resolution": 8, "evaluate.batch_size": 8, "mask_probability": 0.5}
    run(evaluate, changed(config, changes), tmp_path / "run")
    values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert values["objective"] == "masked"
    found.append(values["nats_per_token"])
  # A converted checkpoint says with which probability pixels are masked: the default's.
  visible = numpy_reference.forward(variables, TOKENS)["per_image"].mean()
  assert len({found[0], found[1], visible}) == 3


def test_dtype_is_kept(tmp_path):
  """bfloat16 weights stay so in every file, and are float32 in a job."""
  with formats.open_foreign(write_tiny(tmp_path / "source")[0]) as foreign:
    params, config = foreign.load(dtype=ml_dtypes.bfloat16), foreign.config
  formats.save(tmp_path / "hf", "huggingface", config, params)
  workdir = convert_to("orbax", tmp_path / "hf", tmp_path / "workdir")
  back = convert_to("huggingface", workdir, tmp_path / "hf2")
  assert (back / "model.safetensors").read_bytes() == (
    tmp_path / "hf" / "model.safetensors"
  ).read_bytes()
  from igpt_jax.parallel.sharding import make_mesh

  loaded = checkpoint.load_pretrained(str(workdir), make_mesh(1, -1, 1)).params
  assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"float32"}
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), loaded, params)


@pytest.mark.parametrize("kind", ["openai", "huggingface", "orbax", "safetensors"])
def test_weights_are_rounded_where_it_is_asked_for(kind, tiny, tmp_path):
  exact = formats.load(tiny["openai"]).params
  target = tmp_path / f"{kind}-7"
  values = {"source": str(tiny["orbax"]), "target": str(target), "format": kind}
  run(
    convert,
    settings(
      "convert", convert__dtype="bfloat16", **{f"convert__{k}": v for k, v in values.items()}
    ),
  )
  found = weights.read_on_host(weights.describe(str(target), settings()), lambda line: None)

  def check(leaf, expected):
    assert leaf.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(leaf, expected.astype(ml_dtypes.bfloat16))

  jax.tree.map(check, found, exact)


def test_a_trained_checkpoint_goes_out_without_its_optimizer(tiny, tmp_path):
  """A run's own workdir, the newest step of it, with the palette that it was trained with."""
  prefix = convert_to("openai", tiny["orbax"] / "checkpoints" / str(STEP), tmp_path / "x" / "m")
  assert_same_variables(variables_of(prefix), variables_of(tiny["openai"]))
  np.testing.assert_array_equal(np.load(tmp_path / "x" / "kmeans_centers.npy"), CLUSTERS)


# --- jobs that read --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai", "huggingface", "orbax", "safetensors"])
def test_samples_come_with_the_palette_that_lay_beside_the_weights(kind, tiny, pictures, tmp_path):
  config = settings("base", checkpoint=str(tiny[kind]), sample__samples=2, **pictures)
  changes = {"sample.completions": 2, "sample.per_image": 1, "sample.scale": 1}
  run(sample, changed(config, changes), tmp_path)
  values = json.loads((tmp_path / "sample.json").read_text())
  assert values["step"] == (0 if kind == "huggingface" else STEP)
  painted = np.asarray(Image.open(tmp_path / "samples.png").convert("RGB")).reshape(-1, 3)
  colours = {tuple(c) for c in np.rint(127.5 * (CLUSTERS + 1)).astype(np.uint8)}
  assert len({tuple(c) for c in painted} & colours) > 5


def test_probe_of_imported_weights(tiny, pictures, tmp_path):
  config = settings("base", checkpoint=str(tiny["huggingface"]), **pictures)
  run(probe, changed(config, {"features.batch_size": 8, "data.validation": 0.3}), tmp_path)
  values = json.loads((tmp_path / "probe.json").read_text())
  assert [row["layer"] for row in values["rows"] if row["kind"] == "layer"] == [0, 1, 2]
  # Dark or light is in every pixel: features that are the images' keep it.
  assert values["test_accuracy"] > 0.9


def test_a_missing_palette_can_be_given(bare, pictures, tmp_path):
  np.save(tmp_path / "palette.npy", CLUSTERS)
  config = settings("base", checkpoint=str(bare["openai"]), evaluate__batch_size=8, **pictures)
  with pytest.raises(UserError, match=r"no palette.*kmeans_centers.*palette\.path"):
    run(evaluate, config, tmp_path / "without")
  config = changed(config, {"palette.path": str(tmp_path / "palette.npy")})
  run(evaluate, config, tmp_path / "with")
  assert (tmp_path / "with" / "evaluation.json").exists()


# --- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openai", "huggingface", "orbax", "safetensors"])
def test_pretraining_starts_from_the_weights(kind, tiny, tmp_path):
  """The first loss is the reference's; size, palette and objective are the checkpoint's."""
  source = tmp_path / "source"
  folder = tiny[kind] if tiny[kind].is_dir() else tiny[kind].parent
  shutil.copytree(folder, source)
  path = source / tiny[kind].relative_to(folder)
  (tmp_path / "tokens").mkdir()
  for split in ("train", "validation", "test"):
    np.save(tmp_path / "tokens" / f"{split}.npy", np.repeat(TOKENS[:1], 16, 0))
  config = settings("base", data__name="tokens", data__path=str(tmp_path / "tokens"))
  config = changed(config, {
    "init_from": str(path), "mesh.data": -1, "mesh.fsdp": 2, "train.batch_size": 8, "train.steps": 3,
    "train.learning_rate": 1e-3, "train.log_every": 1, "train.checkpoint_every": 2,
  })  # fmt: skip
  workdir = tmp_path / "run"
  run(pretrain, config, workdir)
  losses = [r["loss"] for r in metrics.read_jsonl(workdir / "metrics.jsonl") if "loss" in r]
  expected = numpy_reference.forward(variables_of(tiny["openai"]), TOKENS[:1])["per_image"][0]
  assert losses[0] == pytest.approx(expected, abs=2e-5)
  assert losses[2] < losses[0] - 1e-3, "it doesn't learn"
  found = checkpoint.describe(str(workdir))
  assert {name: found.run["model"][name] for name in SIZES} == SIZES
  np.testing.assert_array_equal(found.palette, CLUSTERS)

  if kind != "huggingface":
    return
  # The same command with other settings of what is told goes on, the source long gone.
  shutil.rmtree(source)
  config = changed(config, {"train.max_to_keep": 5})
  run(pretrain, config, workdir)
  np.testing.assert_array_equal(checkpoint.describe(str(workdir)).palette, CLUSTERS)
  # The other jobs read what was trained, not what it began with.
  config = changed(config, {"evaluate.batch_size": 8})
  run(evaluate, config, workdir)
  values = json.loads((workdir / "evaluation.json").read_text())
  assert values["checkpoint"].startswith(str(workdir)) and values["nats_per_token"] < losses[0]
  # Where it began is part of what the run is.
  config = changed(config, {"init_from": ""})
  with pytest.raises(UserError, match="init_from"):
    run(pretrain, config, workdir)


def test_init_from_serves_the_other_jobs_in_a_new_workdir(tiny, tmp_path):
  np.save(tmp_path / "tokens.npy", TOKENS)
  config = settings("base", data__name="tokens", data__path=f"{tmp_path}/tokens.npy")
  config = changed(config, {"init_from": str(tiny["openai"]), "evaluate.batch_size": 8})
  run(evaluate, config, tmp_path / "run")
  values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert values["checkpoint"] == str(tiny["openai"])


# --- the release -----------------------------------------------------------------------------------


def test_download_then_evaluate_as_the_config_says(tmp_path, monkeypatch):
  """Both commands of configs/openai_s_eval.py, from a server that has tiny weights."""
  release = tmp_path / "release"
  prefix, variables = write_tiny(release, num_shards=32, n_layer=4)
  monkeypatch.chdir(tmp_path)
  with serving(BlobStore()) as server:
    for path in release.iterdir():
      name = path.name.replace(prefix.name, "model.ckpt-1000000")
      folder = "color-clusters" if path.suffix == ".npy" else "checkpoints/igpt-s/1000000"
      server.files[f"{folder}/{name}"] = path.read_bytes()
    for kind, array in (("X", TOKENS), ("Y", np.zeros(len(TOKENS), np.int64))):
      np.save(release / f"{kind}.npy", array)
      server.files[f"datasets/imagenet_te{kind}.npy"] = (release / f"{kind}.npy").read_bytes()
    config = settings("openai_s_eval", download__url=server.url)
    run(download, config)
    asked = len(server.requests)
    assert asked == 1 + 32 + 1 + 2
    run(download, config)
    assert len(server.requests) == asked, "what is there is fetched again"
  # Tiny weights are of tiny images.
  config = changed(config, {"data.resolution": 8, "evaluate.batch_size": 8})
  run(evaluate, config, tmp_path / "run")
  values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  expected = numpy_reference.forward(variables, TOKENS)["per_image"].mean()
  assert values["nats_per_token"] == pytest.approx(expected, abs=1e-5)
  assert values["step"] == 1_000_000


@pytest.mark.parametrize("size, nats", [("s", "2.0895"), ("m", "2.0614"), ("l", "2.0466")])
def test_published_evaluations(size, nats):
  config = settings(f"openai_{size}_eval")
  assert (config.job, config.download.model) == ("evaluate", size)
  assert nats in (ROOT / "configs" / f"openai_{size}_eval.py").read_text()


# --- mistakes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def things(tiny, bare, pictures, tmp_path_factory):
  """What mistakes are made with: name -> path."""
  folder = tmp_path_factory.mktemp("things")
  (folder / "empty").mkdir()
  (folder / "garbage").write_bytes(b"\x93weights" * 100)
  (folder / "new").mkdir()
  (folder / "new" / "config.json").write_text(json.dumps(as_json(Settings())))
  (folder / "taken").mkdir()
  np.save(folder / "taken" / "kmeans_centers.npy", CLUSTERS)
  np.save(folder / "other.npy", CLUSTERS[::-1])
  np.save(folder / "small.npy", CLUSTERS[:5])
  bert, _ = write_tiny(folder / "bert", causal=False)
  return {
    "roots": [folder, *(each["openai"].parent.parent for each in (tiny, bare))],
    **tiny,
    **{f"bare_{kind}": path for kind, path in bare.items()},
    "bert": bert,
    "images": pictures["data__path"],
    "folder": folder,
  }


INIT = "--config.init_from={openai}"
FOLDER = "--config.data.name=folder --config.data.path={images} --config.data.resolution=8"
TO = "--config.convert.source={openai} --config.convert.target={folder}/out"
MISTAKES = {
  "unknown format": ("convert", f"{TO} --config.convert.format=onnx", "onnx.*huggingface"),
  "no source": ("convert", "--config.convert.target={folder}/out", "source.*empty"),
  "no target": ("convert", "--config.convert.source={openai}", "target.*empty"),
  "source is garbage": ("convert", f"{TO} --config.convert.source={{folder}}/garbage", "garbage"),
  "source is nowhere": (
    "convert",
    f"{TO} --config.convert.source={{folder}}/nowhere",
    "nothing is there",
  ),
  "source is empty": ("convert", f"{TO} --config.convert.source={{folder}}/empty", "holds nothing"),
  "source is a new workdir": (
    "convert",
    f"{TO} --config.convert.source={{folder}}/new",
    "no checkpoint in",
  ),
  "target is there": ("convert", f"{TO} --config.convert.target={{orbax}}", "exists"),
  "target is there, hf": (
    "convert",
    f"{TO} --config.convert.format=huggingface --config.convert.target={{huggingface}}",
    "exists",
  ),
  "target is there, openai": (
    "convert",
    "--config.convert.source={orbax} --config.convert.format=openai --config.convert.target={openai}",
    "exists",
  ),
  "target's palette is there": (
    "convert",
    f"{TO} --config.convert.format=openai --config.convert.target={{folder}}/taken/model",
    "kmeans_centers.npy exists",
  ),
  "target is a directory": (
    "convert",
    f"{TO} --config.convert.format=openai --config.convert.target={{folder}}/",
    "prefix",
  ),
  "target's parent is a file": (
    "convert",
    f"{TO} --config.convert.format=openai --config.convert.target={{folder}}/garbage/model",
    "garbage",
  ),
  "target's parent is a file, orbax": (
    "convert",
    f"{TO} --config.convert.target={{folder}}/garbage/workdir",
    "garbage",
  ),
  "BERT to Hugging Face": (
    "convert",
    f"{TO} --config.convert.source={{bert}} --config.convert.format=huggingface",
    "BERT",
  ),
  "palette of another size": (
    "convert",
    f"{TO} --config.convert.source={{bare_openai}} --config.palette.path={{folder}}/small.npy",
    "5 colours.*17",
  ),
  "another depth": (
    "quickstart",
    f"{INIT} --config.model.n_layer=3",
    "model.n_layer: 3 in the config, 2 in the checkpoint(.|\n)*--config.model.n_layer=2",
  ),
  "another size": (
    "base",
    f"{INIT} --config.model.size=m",
    "n_embd: 1024 in the config's model.size m, 16 in(.|\n)*fix: --config.model.size=;",
  ),
  "another palette size": (
    "base",
    f"{INIT} --config.palette.size=512",
    "palette.size: 512 in the config, 17 in the checkpoint",
  ),
  "another objective": (
    "base",
    f"{INIT} --config.objective=masked",
    "objective: masked in the config, autoregressive in the checkpoint",
  ),
  "another resolution": (
    "base",
    f"{INIT} {FOLDER} --config.data.resolution=32",
    "data.resolution: 32 in the config, 8 in the checkpoint",
  ),
  "init_from nowhere": ("base", f"{FOLDER} --config.init_from={{folder}}/nowhere", "nowhere"),
  "no palette to train with": (
    "base",
    f"{FOLDER} --config.init_from={{bare_huggingface}}",
    "preprocessor_config.*palette.path",
  ),
  "other colours": (
    "base",
    f"{FOLDER} {INIT} --config.palette.path={{folder}}/other.npy",
    "other colours",
  ),
  "evaluate garbage": (
    "base",
    f"{FOLDER} --config.job=evaluate --config.checkpoint={{folder}}/garbage",
    "garbage",
  ),
  "sample without a palette": (
    "base",
    f"{FOLDER} --config.job=sample --config.checkpoint={{bare_openai}}",
    "palette.path",
  ),
  "tokens from nowhere": ("base", "--config.data.name=tokens", "data.path: empty"),
  "no such model": (
    "base",
    "--config.job=download --config.download.model=xl",
    "expected one of s, m, l",
  ),
  "nothing to download": (
    "base",
    "--config.job=download --config.download.model= --config.download.data=",
    "at least one",
  ),
}
IN_A_PROCESS = [
  "unknown format",
  "source is garbage",
  "another depth",
  "sample without a palette",
]


def config_of(name, things):
  """The config that the mistake's flags make."""
  base, flags, _ = MISTAKES[name]
  changes = {}
  for flag in flags.split():
    field, value = flag.removeprefix("--config.").format(**things).split("=", 1)
    changes[field] = int(value) if value.isdigit() and field != "download.model" else value
  return settings_of(None if base == "base" else load_config(base), changes)


def listing(*folders):
  paths = (path for folder in folders for path in pathlib.Path(folder).rglob("*"))
  return sorted((str(path), path.stat().st_mtime_ns) for path in paths)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_leaves_nothing(name, things, tmp_path):
  jobs = dict(convert=convert, pretrain=pretrain, evaluate=evaluate, sample=sample)
  before = listing(*things["roots"])
  with pytest.raises(UserError, match=MISTAKES[name][2]) as caught:
    config = config_of(name, things)
    run({**jobs, "download": download}[config.job], config, tmp_path / "run")
  assert len(str(caught.value)) < 800
  assert listing(*things["roots"]) == before
  left = {path for path, _ in listing(tmp_path)}
  assert left <= {str(tmp_path / "run"), str(tmp_path / "run" / ".lock")}


def call(config, flags, workdir):
  command = [sys.executable, "-m", "igpt_jax.main", f"--config=configs/{config}.py"]
  command += [f"--workdir={workdir}", *flags.split()]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_mistakes_exit_with_status_2_and_no_traceback(things, tmp_path):
  def make(name):
    config, flags, _ = MISTAKES[name]
    # A file is needed; what it says of the model isn't looked at by these mistakes.
    config = "imagenet32_s" if config == "base" else config
    return call(config, flags.format(**things), tmp_path / name.replace(" ", "_"))

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for name, done in zip(IN_A_PROCESS, pool.map(make, IN_A_PROCESS), strict=True):
      assert done.returncode == 2, (name, done.stderr)
      assert "Traceback" not in done.stderr and done.stderr.startswith("igpt_jax: "), done.stderr


def test_a_run_cannot_go_on_from_imported_parameters(tiny, pictures):
  before = listing(tiny["orbax"] / "checkpoints")
  with pytest.raises(UserError, match=r"without a training state.*init_from"):
    run(pretrain, settings("base", **pictures), tiny["orbax"])
  assert set(os.listdir(tiny["orbax"])) <= {"checkpoints", ".lock"}
  assert listing(tiny["orbax"] / "checkpoints") == before


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 10)])
def test_a_damaged_checkpoint_of_ours_is_named(tiny, tmp_path, damage):
  workdir = shutil.copytree(tiny["orbax"], tmp_path / "workdir")
  pieces = [
    path for path in pathlib.Path(workdir).glob("checkpoints/*/params/*/c/**/*") if path.is_file()
  ]
  assert len(pieces) >= 11
  for path in pieces[::2]:
    damage(path)
  flags = f"--config.convert.source={workdir} --config.convert.target={tmp_path}/hf --config.convert.format=huggingface"
  done = call("convert", flags, tmp_path)
  assert done.returncode == 2, done.stderr
  expected = f"igpt_jax: checkpoint: {workdir}/checkpoints/{STEP} can't be read"
  assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr
  assert not (tmp_path / "hf").exists()
