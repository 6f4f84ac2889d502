"""Downloads: resumed where they stopped, checked where the server says how, never half there."""

import base64

import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.pretrained import released
from support.blob_store import BlobStore
from support.loopback import serving


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(released.time, "sleep", lambda seconds: None)
  with serving(BlobStore()) as store:
    yield store


CONTENT = np.random.default_rng(0).bytes(3_000_000)


def fetch(server, tmp_path, name="a/b.bin", lines=None):
  report = None if lines is None else lines.append
  return released.download([name], tmp_path, base_url=server.url, report=report)


def test_names_of_the_release():
  files = released.checkpoint_files("l", 524000, bert=True)
  assert len(files) == 66
  assert files[0] == "checkpoints/igpt-l-bert/524000/model.ckpt-524000.index"
  assert files[64] == "checkpoints/igpt-l-bert/524000/model.ckpt-524000.data-00063-of-00064"
  assert len(released.checkpoint_files("s")) == 34
  assert released.dataset_files("imagenet") == [
    "datasets/imagenet_teX.npy",
    "datasets/imagenet_teY.npy",
  ]


@pytest.mark.parametrize(
  "call",
  [
    lambda: released.checkpoint_files("xl"),
    lambda: released.checkpoint_files("s", 5),
    lambda: released.dataset_files("stl10"),
    lambda: released.dataset_files("cifar10", ["test"]),
  ],
)
def test_what_was_not_released(call):
  with pytest.raises(UserError, match="expected one of"):
    call()


def test_a_file_arrives_whole_and_is_kept(server, tmp_path):
  server.files["a/b.bin"] = CONTENT
  lines = []
  assert fetch(server, tmp_path, lines=lines) == [str(tmp_path / "b.bin")]
  assert (tmp_path / "b.bin").read_bytes() == CONTENT
  assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]
  assert "3 MB of 3 MB" in lines[-1]
  fetch(server, tmp_path, lines=lines)
  assert len(server.requests) == 1
  assert "already exists" in lines[-1]


def test_a_cut_connection_is_resumed(server, tmp_path):
  server.files["a/b.bin"] = CONTENT
  server.cut_after = [1_000_000, 500_000]
  fetch(server, tmp_path)
  assert (tmp_path / "b.bin").read_bytes() == CONTENT
  starts = [asked for _, asked in server.requests]
  assert starts == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_stopped_download_goes_on_next_time(server, tmp_path):
  server.files["a/b.bin"] = CONTENT
  server.cut_after = [100_000] * 5
  with pytest.raises(UserError, match=r"cut off .* 5 times.*resumes where it stopped"):
    fetch(server, tmp_path)
  assert not (tmp_path / "b.bin").exists()
  fetch(server, tmp_path)
  assert server.requests[-1] == ("/a/b.bin", "bytes=500000-")
  assert (tmp_path / "b.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("ignores_if_range", [False, True])
@pytest.mark.parametrize("size", [len(CONTENT), 50_000])
def test_a_changed_file_is_not_spliced(server, tmp_path, ignores_if_range, size):
  server.files["a/b.bin"] = CONTENT
  server.cut_after = [100_000] * 5
  with pytest.raises(UserError):
    fetch(server, tmp_path)
  server.ignores_if_range = ignores_if_range
  server.files["a/b.bin"] = changed = CONTENT[::-1][:size]
  fetch(server, tmp_path)
  assert (tmp_path / "b.bin").read_bytes() == changed


def test_damage_on_the_way_is_noticed(server, tmp_path):
  server.files["a/b.bin"] = CONTENT
  server.md5 = base64.b64encode(bytes(16)).decode()
  with pytest.raises(UserError, match="doesn't match the server's MD5"):
    fetch(server, tmp_path)
  assert not list(tmp_path.iterdir())


def test_damage_of_the_partial_file_is_noticed_and_mended(server, tmp_path):
  server.files["a/b.bin"] = CONTENT
  server.cut_after = [100_000] * 5
  with pytest.raises(UserError):
    fetch(server, tmp_path)
  part = tmp_path / "b.bin.part"
  part.write_bytes(b"x" + part.read_bytes()[1:])
  fetch(server, tmp_path)
  assert (tmp_path / "b.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_an_absent_file_is_not(server, tmp_path):
  server.files["a/b.bin"] = CONTENT
  server.statuses = [503, 500, 429]
  fetch(server, tmp_path)
  assert len(server.requests) == 4
  with pytest.raises(UserError, match="404"):
    fetch(server, tmp_path, "a/absent.bin")
  assert len(server.requests) == 5


def test_a_file_of_unknown_length_is_refused(server, tmp_path):
  server.files["a/b.bin"] = CONTENT
  server.hides_length = True
  with pytest.raises(UserError, match="how long the file is"):
    fetch(server, tmp_path)


def test_no_network_is_a_clear_error(server, tmp_path):
  server.server_close()  # nobody listens there any more
  with pytest.raises(UserError, match=r"127\.0\.0\.1.* 5 times; fix: check the network"):
    fetch(server, tmp_path)


def test_no_room_is_said_before_anything_is_written(server, tmp_path, monkeypatch):
  server.files["a/b.bin"] = CONTENT
  usage = released.shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(released.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(UserError, match="needs 3 MB more"):
    fetch(server, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made(server):
  with pytest.raises(UserError, match="directory for downloads"):
    released.download(["a"], f"{__file__}/x", base_url=server.url)
