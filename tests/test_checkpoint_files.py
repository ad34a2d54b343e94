"""Files of a checkpoint or store that are not what they seem: links, pipes, devices, no end, no permission."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import packed, write_checkpoint

from hybrid.errors import WeightsError
from hybrid.files import atomic_file, read_json_object
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.mapped import MappedFile
from hybrid.weights.pack import cached_store, pack
from hybrid.weights.store import Store

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00002.safetensors"
NOBODY = 65534


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (replaced(os.mkfifo), "is a pipe and no regular file"),
    "a link to an endless device": (replaced(lambda path: path.symlink_to("/dev/zero")), "is a device and no regular"),
    "a directory": (replaced(os.mkdir), "is a directory and no|missing|has no|has neither"),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), "cannot be read .Too many levels"),
    "empty": (lambda path: os.truncate(path, 0), "is truncated|is not valid JSON"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
def test_odd_files_of_a_checkpoint_are_refused_at_once(tmp_path: Path, name: str, odd: str) -> None:
    source = write_checkpoint(tmp_path / "model", "qwen3_moe", shards=2)
    change, message = ODD[odd]
    change(source / name)
    with pytest.raises(WeightsError, match=message) as error:
        Checkpoint.open(source)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_json_file_as_large_as_a_disk_is_not_read(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "model", "qwen3_moe", shards=2)
    os.truncate(source / name, 10**11)
    with pytest.raises(WeightsError, match=f"{name}: has 100,000 MB, 67 are allowed"):
        Checkpoint.open(source)


def test_a_pipe_among_the_companions_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(WeightsError, match=r"tokenizer.json: is a pipe"):
        pack(Checkpoint.open(source), tmp_path / "store")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["manifest.json", "outer.safetensors"])
def test_odd_files_of_a_store_are_refused_at_once(tmp_path: Path, name: str, odd: str) -> None:
    store = packed(write_checkpoint(tmp_path / "model", "qwen3_moe")).path
    change, message = ODD[odd]
    change(store / name)
    with pytest.raises(WeightsError, match=f"{message}|manifest says|is not a packed store|No such file"):
        Store.open(store)


def test_an_empty_shard_of_a_manifest_that_agrees_is_refused(tmp_path: Path) -> None:
    store = packed(write_checkpoint(tmp_path / "model", "llama"))
    os.truncate(store.path / "outer.safetensors", 0)
    with pytest.raises(WeightsError, match="cannot be mapped"):
        MappedFile(store.path / "outer.safetensors", 0)


def test_json_is_bounded_in_depth_and_digits(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for depth, message in ((63, ""), (64, "nested deeper than 64 levels"), (100_000, "is not valid JSON")):
        path.write_text('{"x": ' + "[" * depth + "]" * depth + "}")
        if message:
            with pytest.raises(WeightsError, match=message):
                read_json_object(path)
        else:
            read_json_object(path)
    path.write_text('{"x": 1' + "0" * 5000 + "}")
    with pytest.raises(WeightsError, match="is not valid JSON"):
        read_json_object(path)


def test_only_known_files_of_the_checkpoint_are_copied(tmp_path: Path) -> None:
    source, notices = write_checkpoint(tmp_path / "model", "llama"), list[str]()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / "tokenizer_secrets").write_text("unknown name")
    (source / "vocab.txt").mkdir()
    (source / "tokenizer.json").symlink_to(secret)
    (source / "merges.txt").symlink_to("inside.txt")
    (source / "inside.txt").write_text("inside")
    pack(Checkpoint.open(source), tmp_path / "store", notice=notices.append)
    copies = {file.name for file in (tmp_path / "store").iterdir() if file.suffix != ".safetensors"}
    assert copies == {"manifest.json", "config.json", "merges.txt"}
    assert (tmp_path / "store/merges.txt").read_text() == "inside"
    assert not (tmp_path / "store/merges.txt").is_symlink()
    assert notices == [f"note: {source}/tokenizer.json is a link out of the checkpoint, so the store has no copy of it"]


def test_links_to_the_blobs_of_the_hub_are_followed(tmp_path: Path) -> None:
    """Not those to the blobs of another repository."""
    repository, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = repository / "snapshots/abc"
    write_checkpoint(snapshot, "llama")
    for folder in (repository, other):
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs/0123").write_text(folder.name)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (snapshot / "merges.txt").symlink_to(other / "blobs/0123")
    pack(Checkpoint.open(snapshot), tmp_path / "store")
    assert (tmp_path / "store/tokenizer.json").read_text() == "models--a--b"
    assert not (tmp_path / "store/merges.txt").exists()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_copies_keep_their_permissions(tmp_path: Path, mode: int) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").chmod(mode)
    pack(Checkpoint.open(source), tmp_path / "store")
    assert stat.S_IMODE((tmp_path / "store/tokenizer.json").stat().st_mode) == mode


@contextmanager
def as_nobody() -> Iterator[None]:
    """As a user without rights, where the tests run as one with all."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that everybody may search, which pytest's own is not."""
    folder = Path("/tmp") / f"hybrid-test-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o755)
    yield folder
    for place, _, _ in os.walk(folder):
        os.chmod(place, 0o755)
    shutil.rmtree(folder)


def read_only(path: Path) -> None:
    for place in (path, *path.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)


@pytest.mark.parametrize("readable", [True, False])
def test_a_whole_store_in_a_cache_that_is_read_only_is_used(shared: Path, readable: bool) -> None:
    """Even if a companion has changed since, and whether or not the weights themselves may be read."""
    source = write_checkpoint(shared / "model", "llama")
    (source / "generation_config.json").write_text("{}")
    (source / SINGLE).chmod(0o644 if readable else 0o000)
    first = cached_store(source, shared / "cache").path if os.geteuid() == 0 or readable else None
    if first is None:
        pytest.skip("needs a user who may read what others may not")
    read_only(shared / "cache")
    os.utime(source / "generation_config.json", (5, 5))
    with as_nobody(), cached_store(source, shared / "cache") as store:
        assert store.path == first
    with as_nobody(), pytest.raises(WeightsError if not readable else Exception, match="cannot be "):
        cached_store(source, shared / "cache", "int8")


@pytest.mark.parametrize("what", ["folder", "config.json", SINGLE, "manifest.json", "outer.safetensors"])
def test_what_may_not_be_read_is_named(shared: Path, what: str) -> None:
    source = write_checkpoint(shared / "model", "llama", tie_word_embeddings=False)
    store = packed(source).path
    shutil.copytree(store, shared / "store")
    model = shared / "store" if what in ("manifest.json", "outer.safetensors") else source
    for file in (*source.iterdir(), *(shared / "store").iterdir()):
        file.chmod(0o644)
    (model if what == "folder" else model / what).chmod(0o000)
    with as_nobody(), pytest.raises(WeightsError, match=r"cannot be read \(Permission denied\)"):
        cached_store(model, shared / "cache")
    model.chmod(0o755)


def test_an_error_of_writing_is_not_hidden_by_that_of_cleaning_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only mount, where there is nothing to remove and removing is an error too."""
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(WeightsError, match="cannot be written"), atomic_file(tmp_path / "missing/x"):
        pass
