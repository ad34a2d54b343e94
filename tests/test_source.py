"""A cache keeps the models apart: by their content, wherever they lie and whatever their names and times say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_tensors, write_checkpoint, write_tensors
from configs import CONFIGS

from hybrid.errors import WeightsError
from hybrid.weights import pack as packing
from hybrid.weights import source as identity
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import cached_store, pack
from hybrid.weights.source import source_fingerprint

NORM = "model.norm.weight"
SHARD = "model-00002-of-00003.safetensors"


def written(path: Path, seed: int = 0, time: int = 1) -> Path:
    """A checkpoint all of whose files have one time, as those of image layers and package stores have."""
    write_tensors(path, CONFIGS["qwen3_moe"], random_tensors(CONFIGS["qwen3_moe"], seed=seed), shards=3)
    set_times(path, time)
    return path


def set_times(path: Path, time: int = 1) -> None:
    for file in path.iterdir():
        os.utime(file, (time, time))


def change_a_byte(file: Path) -> None:
    """In place and with the time restored."""
    status = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(-1000, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-1000, os.SEEK_END)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(params=["whole", "sampled"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small checkpoints are read to the last byte, large ones are not."""
    if request.param == "sampled":
        monkeypatch.setattr(identity, "READ_WHOLE", 1000)
        monkeypatch.setattr(identity, "SAMPLE_BYTES", 256)


@pytest.mark.usefixtures("reading")
def test_models_of_one_name_with_the_same_sizes_and_times_are_apart(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"v{seed}/model", seed) for seed in (1, 2)]
    for path in paths:
        with cached_store(path, tmp_path / "cache") as store:
            expected = random_tensors(CONFIGS["qwen3_moe"], seed=1 + paths.index(path))[NORM]
            assert (store.array("final_norm") == expected.astype(np.float32)).all()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("form", ["moved", "copied", "linked files", "linked folder", "renamed"])
def test_a_copy_or_a_link_of_a_model_is_that_model(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = written(tmp_path / "one/model"), tmp_path / "other/model"
    first = cached_store(path, tmp_path / "cache").path
    other.parent.mkdir()
    if form == "moved":
        shutil.move(path, other)
    elif form == "copied":
        shutil.copytree(path, other)
    elif form == "linked folder":
        other.symlink_to(path)
    elif form == "renamed":
        other = path.rename(path.with_name("another name"))
    else:
        other.mkdir()
        for file in path.iterdir():
            (other / file.name).symlink_to(file)
    monkeypatch.setattr(Checkpoint, "open", lambda path: pytest.fail("it was packed again"))
    assert cached_store(other, tmp_path / "cache").path == first


def test_revisions_in_the_cache_of_the_hub_share_what_they_have_in_common(tmp_path: Path) -> None:
    """Their files are links to blobs, named by a hash of their content and shared by revisions."""
    repository = tmp_path / "models--org--name"
    written(repository / "blobs")
    other = written(tmp_path / "v2", seed=1) / SHARD
    blobs = {
        file.name: file.rename(file.with_name(f"{i:064x}")) for i, file in enumerate((repository / "blobs").iterdir())
    }
    other = other.rename(repository / "blobs" / f"{99:064x}")
    for revision, changed in (("aaaa", {}), ("bbbb", {}), ("cccc", {SHARD: other})):
        (repository / "snapshots" / revision).mkdir(parents=True)
        for name, blob in {**blobs, **changed}.items():
            (repository / "snapshots" / revision / name).symlink_to(Path("../../blobs") / blob.name)
    first, same, changed = (
        cached_store(repository / "snapshots" / r, tmp_path / "cache").path for r in ("aaaa", "bbbb", "cccc")
    )
    assert first == same != changed
    assert first.name.startswith("org--name-") and changed.name.startswith("org--name-")


@pytest.mark.usefixtures("reading")
def test_the_hash_in_the_name_of_a_blob_counts(tmp_path: Path) -> None:
    """Two blobs of the same size and time that differ only where nobody looks."""
    written(tmp_path / "model")
    found = []
    for name in ("a" * 64, "b" * 64):
        blob = shutil.copy2(tmp_path / "model" / SHARD, tmp_path / name)
        (tmp_path / "model" / SHARD).unlink()
        (tmp_path / "model" / SHARD).symlink_to(blob)
        found.append(source_fingerprint(tmp_path / "model"))
    assert found[0] != found[1]


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte, its time restored": lambda path: change_a_byte(path / SHARD),
    "a time": lambda path: os.utime(path / SHARD, (2, 2)),
    "the configuration": lambda path: (path / "config.json").write_text(
        json.dumps({**CONFIGS["qwen3_moe"], "rope_theta": 20000.0})
    ),
    "the index": lambda path: (path / "model.safetensors.index.json").write_bytes(
        (path / "model.safetensors.index.json").read_bytes() + b" "
    ),
    "other weights of the same time": lambda path: written(path, seed=3),
    "a tensor replaced by rename": lambda path: os.replace(written(path.with_name("x"), 3) / SHARD, path / SHARD),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_another_model(tmp_path: Path, change: str) -> None:
    path = written(tmp_path / "model")
    first = cached_store(path, tmp_path / "cache").path
    assert cached_store(path, tmp_path / "cache").path == first
    CHANGES[change](path)
    assert cached_store(path, tmp_path / "cache").path != first


def test_only_files_with_tensors_of_the_model_count(tmp_path: Path) -> None:
    path = written(tmp_path / "model")
    first = source_fingerprint(path)
    (path / "README.md").write_text("x")
    shutil.copy(path / SHARD, path / "consolidated.safetensors")
    os.mkfifo(path / "pipe.safetensors")
    assert source_fingerprint(path) == first


def test_a_large_checkpoint_is_identified_by_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60 GB, here a file with a hole, the header and 16 MiB are read."""
    path = write_checkpoint(tmp_path / "model", "llama")
    os.truncate(path / "model.safetensors", 60 * 10**9)
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *of: read.append(of[1]) or pread(*of))
    found = source_fingerprint(path)
    assert 16 << 20 <= sum(read) < 17 << 20
    with open(path / "model.safetensors", "r+b") as file:  # a matrix of 50 MB, in one of more than a thousand places
        file.seek(31 * 10**9)
        file.write(b"x" * 50_000_000)
    assert source_fingerprint(path) != found


def test_a_checkpoint_that_changes_while_it_is_packed_leaves_no_store(tmp_path: Path) -> None:
    path, store = written(tmp_path / "model"), tmp_path / "store"

    def change(what: str, done: int, total: int) -> None:
        if done == total:
            written(path, seed=2)

    with pytest.raises(WeightsError, match="was changed while it was packed"):
        pack(Checkpoint.open(path), store, progress=change)
    assert [file.name for file in store.iterdir()] == ["packing.json"]
    pack(Checkpoint.open(path), store)


def test_who_may_not_read_weights_finds_the_store_of_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the place of the files; a copy elsewhere may be another model."""
    path = written(tmp_path / "model")
    store = cached_store(path, tmp_path / "cache").path
    copy = shutil.copytree(path, tmp_path / "copy/model")
    monkeypatch.setattr(packing, "may_read_weights", lambda path: False)
    monkeypatch.setattr(packing, "source_fingerprint", lambda path: pytest.fail("weights were read"))
    assert cached_store(path, tmp_path / "cache").path == store
    monkeypatch.setattr(packing, "source_fingerprint", lambda path: "unknown")
    assert packing._store_of_place(copy, tmp_path / "cache", *packing.describe(copy)) is None


@pytest.mark.parametrize("name", ["模" * 81, "x" * 255, "models--a--b", "*?[x]", " "])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name)
    first = cached_store(path, tmp_path / "cache").path
    assert cached_store(path, tmp_path / "cache").path == first and len(os.fsencode(first.name)) < 120


def test_a_folder_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = written(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")))
    assert cached_store(path, tmp_path / "cache").path.name.startswith("model-")
