"""Models of the Hugging Face hub: the real client against a mirror on loopback."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import sys

import numpy as np
import pytest

from igpt_jax.demo import models
from igpt_jax.errors import UserError
from igpt_jax.jobs import convert
from igpt_jax.pretrained import formats, hub
from igpt_jax.reporting import figures
from igpt_jax.workspace import finetuning, provenance, weights
from support import hub_mirror
from support.checkpoint_cases import CLUSTERS, CONFIG, assert_same, edit_json, random_params
from support.hosts import hosts
from support.loopback import serving
from support.tiny import settings_of

NAME = "openai/imagegpt-tiny"
INSTALLED = importlib.util.find_spec("huggingface_hub") is not None

needs_client = pytest.mark.skipif(
  not INSTALLED,
  reason="HUGGINGFACE_HUB ISN'T INSTALLED, fetching from the hub is NOT tested: pip install -e '.[hub]'",
)


@pytest.fixture
def client(monkeypatch, tmp_path):
  """Sets the client's environment, which it reads when it is imported: so it is imported anew."""

  def set_environment(**environment: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
      monkeypatch.delitem(sys.modules, name)
    for name, value in environment.items():
      monkeypatch.setenv(name, value)

  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))
  for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_ENDPOINT"):
    monkeypatch.delenv(name, raising=False)
  set_environment(
    HF_HOME=str(tmp_path / "hf_home"),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
  )
  return set_environment


@pytest.fixture
def mirror(client, tmp_path):
  folder = tmp_path / "served"
  formats.save(folder, "huggingface", CONFIG, random_params(CONFIG), clusters=CLUSTERS)
  with serving(hub_mirror.Mirror()) as mirror:
    mirror.models[NAME] = folder
    client(HF_ENDPOINT=mirror.url)
    yield mirror


def fetch(name: str = NAME) -> hub.Snapshot:
  return hub.fetch(name, lambda line: None)


def test_what_is_a_name_and_what_a_path(client, tmp_path):
  named = [NAME, f"{NAME}@main", f"{NAME}@refs/pr/1", "a/b.c-d_e"]
  assert all(map(hub.is_name, named))
  assert not any(
    map(hub.is_name, [f"./{NAME}", f"/{NAME}", "runs", "a/b/c", "a/../b", f"{NAME}@", ""])
  )
  (tmp_path / "openai").mkdir()
  assert not hub.is_name(NAME), "a misspelt path isn't sent to anybody"
  assert hub.is_name(f"{NAME}@main")
  assert not hub.is_name("runs/photos") and hub.is_name("runs/photos@main")
  with pytest.raises(UserError, match="nothing is there"):
    weights.describe("runs/photos", settings_of())
  with pytest.raises(UserError, match=r"nothing is there.*OWNER/NAME@main"):
    weights.describe(NAME, settings_of())


@needs_client
def test_a_local_folder_of_that_name_wins(mirror, tmp_path):
  (tmp_path / "openai").mkdir()
  own = tmp_path / "openai" / "imagegpt-tiny"
  formats.save(own, "huggingface", CONFIG, random_params(CONFIG))
  info = weights.describe(NAME, settings_of())
  assert info.path == str(own) and "hub" not in info.run
  assert not mirror.requests


@needs_client
def test_a_model_comes_whole_with_its_palette_and_is_fetched_once(mirror, tmp_path, capsys):
  info = weights.describe(NAME, settings_of())
  assert capsys.readouterr().out.startswith(
    f"{NAME} of the Hugging Face hub: commit {mirror.commit}"
  )
  assert info.path.startswith(str(tmp_path / "hf_home")) and info.path.endswith(mirror.commit)
  assert info.run["hub"] == f"{NAME}@{mirror.commit}"
  np.testing.assert_array_equal(info.palette, CLUSTERS)
  assert_same(formats.load(info.path).params, random_params(CONFIG))
  assert sorted(mirror.fetched()) == [
    "config.json", "model.safetensors", "preprocessor_config.json"
  ]  # fmt: skip
  # The same contents under another name are the same checkpoint.
  local = weights.describe(str(mirror.models[NAME]), settings_of())
  assert provenance.of_checkpoint(info) == provenance.of_checkpoint(local)
  weights.describe(f"{NAME}@main", settings_of())
  assert len(mirror.fetched()) == 3


@needs_client
def test_other_files_are_left_where_they_are(mirror):
  for file in ("pytorch_model.bin", "tf_model.h5", "README.md"):
    (mirror.models[NAME] / file).write_bytes(b"large")
  fetch()
  assert len(mirror.fetched()) == 3


@needs_client
def test_jobs_and_the_page_take_a_name(mirror, tmp_path):
  settings = settings_of(
    changes={"job": "convert", "convert.source": NAME, "convert.target": str(tmp_path / "own")}
  )
  convert.run(settings, str(tmp_path))
  info = weights.describe(str(tmp_path / "own"), settings)
  assert info.run["hub"] == f"{NAME}@{mirror.commit}", "a conversion says where it came from"
  served = models.Models([NAME])
  assert [model["name"] for model in served.describe()] == [NAME]
  start = weights.of_job(settings_of(changes={"init_from": NAME}), str(tmp_path / "run"))
  assert start.path.endswith(mirror.commit)


@needs_client
def test_a_commit_is_pinned(mirror):
  assert fetch(f"{NAME}@{mirror.commit}").commit == mirror.commit
  old, mirror.commit = mirror.commit, "f" * 40
  assert fetch(f"{NAME}@{old}").commit == old
  assert fetch().commit == "f" * 40
  with pytest.raises(UserError, match="no such revision"):
    fetch(f"{NAME}@v2")


@needs_client
def test_what_is_in_the_cache_needs_no_network(mirror, client):
  fetch()
  before = len(mirror.requests)
  client(HF_HUB_OFFLINE="1")
  fetch()
  assert len(mirror.requests) == before
  client(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
  assert fetch().commit == mirror.commit
  client(HF_HUB_OFFLINE="1")
  with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*--config.job=download"):
    fetch("openai/imagegpt-other")


@needs_client
@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_part_of_a_model_in_the_cache_says_how_to_get_the_rest(mirror, client, lost):
  folder = pathlib.Path(fetch().folder)
  (folder / lost).unlink()
  client(HF_HUB_OFFLINE="1")  # the client's first versions return what is there
  with pytest.raises(UserError, match=r"fix: (fetch it once without|.*gets the rest)"):
    fetch()
  client(HF_HUB_OFFLINE="0")
  assert (pathlib.Path(fetch().folder) / lost).exists()


@needs_client
@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_client_that_returns_a_part_is_told_from_a_whole(mirror, monkeypatch, lost):
  folder = pathlib.Path(fetch().folder)
  (folder / lost).unlink()
  monkeypatch.setattr(hub, "_getter", lambda name, repo: lambda revision, patterns: str(folder))
  with pytest.raises(UserError, match=rf"{lost.removeprefix('model.')}.*fix: .*gets the rest"):
    fetch()


def test_shards_that_a_snapshot_lacks_are_named(tmp_path):
  names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": names}))
  (tmp_path / "model-1.safetensors").touch()
  assert hub._lacking(str(tmp_path)) == "model-2.safetensors"
  (tmp_path / "model-2.safetensors").touch()
  assert hub._lacking(str(tmp_path)) == ""


@needs_client
def test_a_snapshot_is_known_by_its_name_and_titles_bear_it(mirror):
  snapshot = fetch()
  assert figures.checkpoint_name(snapshot.folder, 0) == NAME
  for name in (NAME, f"{NAME}@main", f"{NAME}@{snapshot.commit[:12]}"):
    assert hub.is_snapshot(snapshot.folder, name)
  for name in ("openai/imagegpt-other", f"{NAME}@fffffff", "runs"):
    assert not hub.is_snapshot(snapshot.folder, name)
  assert not hub.is_snapshot("/runs/a", NAME)


@needs_client
def test_a_resumed_fine_tuning_asks_the_hub_for_nothing(mirror):
  info = weights.describe(NAME, settings_of())
  own = dataclasses.replace(info, run={"began_with": {"checkpoint": info.path}})
  before = len(mirror.requests)
  finetuning._check_same_start(settings_of(changes={"checkpoint": NAME}), "run", own)
  assert len(mirror.requests) == before


@needs_client
def test_no_network_is_said_in_one_line(client):
  client(HF_ENDPOINT="http://127.0.0.1:9")
  with pytest.raises(
    UserError,
    match=rf"{NAME}: nothing is there, and http://127.0.0.1:9 can't be reached.*hf download {NAME}.*job=download",
  ) as caught:
    fetch()
  assert "\n" not in str(caught.value)


@needs_client
@pytest.mark.parametrize("status", [500, 503, 403])
def test_a_hub_that_refuses_is_said(mirror, status):
  mirror.status = status
  with pytest.raises(UserError, match=f"{NAME}: nothing is there, and .*{status}") as caught:
    fetch()
  assert "\n" not in str(caught.value)


@needs_client
def test_a_model_that_is_not_there_or_private(mirror, client):
  with pytest.raises(UserError, match=r"no such model, or a private one.*openai/imagegpt-small"):
    fetch("openai/imagegpt-huge")
  mirror.token = "secret"
  with pytest.raises(UserError, match="fix: the name, or HF_TOKEN"):
    fetch()
  client(HF_TOKEN="secret")
  assert fetch().commit == mirror.commit


@needs_client
def test_a_download_that_is_cut_off_is_resumed(mirror, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # less than this model's size
  mirror.cut_after = [24_000]
  try:
    snapshot = fetch()
  except UserError:  # of the client's first versions: they resume when they are called again
    snapshot = fetch()
  assert_same(formats.load(snapshot.folder).params, random_params(CONFIG))
  ranges = [asked for _, path, asked in mirror.requests if path.endswith("model.safetensors")]
  assert [asked for asked in ranges if asked and asked.startswith("bytes=24000-")]


@needs_client
def test_a_long_download_is_no_hang(mirror, monkeypatch):
  from huggingface_hub import constants

  beats = []
  monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
  monkeypatch.setattr(hub.watchdog, "beat", beats.append)
  fetch()
  assert beats.count(hub._DOING) > 3, "once for the beginning, and again for what has come"


@needs_client
def test_contents_are_compared_with_their_checksum(mirror):
  mirror.spoilt = True
  with pytest.raises(
    UserError, match=r"model\.safetensors isn't what the hub says.*fetches it again"
  ):
    fetch()
  mirror.spoilt = False
  assert_same(formats.load(fetch().folder).params, random_params(CONFIG))


@needs_client
@pytest.mark.parametrize("name", ["preprocessor_config.json", "config.json"])
def test_a_small_file_that_was_damaged_here_is_fetched_again(mirror, name):
  file = pathlib.Path(fetch().folder) / name
  whole = file.read_bytes()
  file.write_bytes(whole[:-9])
  with pytest.raises(UserError, match=f"{name} isn't what the hub says"):
    fetch()
  fetch()
  assert file.read_bytes() == whole


@needs_client
def test_another_model_is_refused_before_its_weights_are_fetched(mirror):
  edit_json(mirror.models[NAME] / "config.json", model_type="gpt2")
  with pytest.raises(UserError, match="model_type gpt2"):
    fetch()
  assert "model.safetensors" not in mirror.fetched()
  (mirror.models[NAME] / "config.json").unlink()
  mirror.commit = "e" * 40
  with pytest.raises(UserError, match=r"no config\.json"):
    fetch()


@needs_client
def test_a_pickle_is_fetched_only_where_torch_can_open_it(mirror, monkeypatch):
  (mirror.models[NAME] / "model.safetensors").rename(mirror.models[NAME] / "pytorch_model.bin")
  monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"only torch opens.*pip install torch.*job=download"):
    fetch()
  assert "pytorch_model.bin" not in mirror.fetched()
  monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: name)
  assert os.path.exists(os.path.join(fetch().folder, "pytorch_model.bin"))


def test_without_the_client_it_is_named(client, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match=r"pip install -e '.*\[hub\]', or a local path"):
    fetch()


@needs_client
@pytest.mark.slow
def test_two_processes_take_one_commit_and_fetch_it_once(mirror, tmp_path):
  tokens = tmp_path / "tokens.npy"
  np.save(tokens, np.zeros((16, CONFIG.n_positions), np.uint8))
  changes = {
    "job": "evaluate", "checkpoint": NAME, "data.name": "tokens", "data.path": str(tokens),
    "data.resolution": 6, "evaluate.batch_size": 8,
  }  # fmt: skip
  with hosts(tmp_path / "logs", tmp_path / "run", changes) as processes:
    processes.succeed()
  values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert values["checkpoint"].endswith(mirror.commit)
  assert len(mirror.fetched()) == 3
