"""`hybrid store`: what the cache keeps is listed, and only stores are removed from it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import packed, write_checkpoint

from hybrid.commands.console import run_app
from hybrid.commands.store import app
from hybrid.errors import WeightsError
from hybrid.formats.packed import LAYOUT_VERSION
from hybrid.weights.kept import kept_stores, remove_store
from hybrid.weights.manifest import Manifest
from hybrid.weights.pack import cached_store


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        run_app(app, "hybrid store", [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two formats of one model, and what is no store."""
    model = write_checkpoint(tmp_path / "model", "llama", tie_word_embeddings=False)
    for mix in ("bf16", "int8"):
        cached_store(model, tmp_path / "cache", mix).close()
    (tmp_path / "cache/machine-x.json").write_text("{}")
    (tmp_path / "cache/letters").mkdir()
    (tmp_path / "cache/letters/letter.txt").write_text("dear")
    (tmp_path / "cache/link").symlink_to(packed(model).path)
    return tmp_path / "cache"


def test_stores_are_listed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = {store.formats: store for store in kept_stores(cache)}
    assert set(stores) == {"bf16", "int8"}
    assert all(store.source == str(cache.with_name("model")) and store.useless == "" for store in stores.values())
    os.utime(stores["int8"].path / "manifest.json", (time.time() - 86400 * 40,) * 2)
    code, out, err = run(capsys, "ls", "--cache-dir", cache)
    assert (code, err) == (0, "")
    assert [line.split("|")[1].strip() for line in out.splitlines()[2:]] == [stores["bf16"].name, stores["int8"].name]
    assert " 40 | ok " in out
    code, out, _ = run(capsys, "ls", "--cache-dir", cache, "--json")
    listed = json.loads(out)["stores"]
    assert [store["formats"] for store in listed] == ["bf16", "int8"] and listed[0]["nbytes"] > 100_000


def test_a_cache_that_is_not_there_has_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "ls", "--cache-dir", tmp_path / "x") == (0, f"{tmp_path}/x has no packed models\n", "")
    assert run(capsys, "gc", "--cache-dir", tmp_path / "x") == (0, "", "0 of 0 packed models, 0.00 GB\n")
    assert not (tmp_path / "x").exists()


def test_stores_are_removed_by_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = kept_stores(cache)
    for name in ("letters", "link", "../model", "nothing", str(first.path)):
        code, out, err = run(capsys, "rm", first.name, name, "--cache-dir", cache)
        assert (code, out, err.count("\n")) == (2, "", 1) and "there is no packed model" in err
    assert run(capsys, "rm", first.name, first.name, "--cache-dir", cache)[0] == 0
    assert kept_stores(cache) == [second]
    assert sorted(path.name for path in cache.iterdir()) == sorted(["letters", "link", "machine-x.json", second.name])
    assert (cache / "letters/letter.txt").read_text() == "dear" and list((cache / "link").iterdir())


def test_a_store_that_is_in_use_may_be_removed_and_one_that_is_packed_may_not(cache: Path) -> None:
    first, second = kept_stores(cache)
    with cached_store(cache.with_name("model"), cache, first.formats) as store:
        expected = store.array("final_norm").copy()
        remove_store(first)
        assert (store.array("final_norm") == expected).all()
    descriptor = os.open(second.path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(WeightsError, match="is being packed by another process"):
        remove_store(second)
    os.close(descriptor)
    assert (second.path / "manifest.json").exists()


def test_files_of_others_in_a_store_are_kept(cache: Path) -> None:
    first, _ = kept_stores(cache)
    (first.path / "mine.safetensors").write_text("mine")
    with pytest.raises(WeightsError, match="is no store any more, but other files are kept: mine.safetensors"):
        remove_store(first)
    assert [path.name for path in first.path.iterdir()] == ["mine.safetensors"]


def reversed_version(store: Path) -> None:
    file = store / "manifest.json"
    file.write_text(file.read_text().replace(f'"layout_version": {LAYOUT_VERSION}', '"layout_version": 2'))


USELESS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "source gone": (lambda model, store: shutil.rmtree(model), "source gone"),
    "weights gone": (lambda model, store: (model / "model.safetensors").unlink(), "source gone"),
    "source changed": (lambda model, store: os.utime(model / "model.safetensors", (1, 1)), "source changed"),
    "unfinished": (lambda model, store: (store / "manifest.json").rename(store / "packing.json"), "unfinished"),
    "damaged": (lambda model, store: (store / "manifest.json").write_text("{"), "damaged"),
    "older": (lambda model, store: reversed_version(store), "of an older version"),
}


@pytest.mark.parametrize("kind", USELESS)
def test_what_nobody_can_use_is_collected(cache: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, state = USELESS[kind]
    chosen, other = kept_stores(cache)
    change(cache.with_name("model"), chosen.path)
    found = {store.name: store.useless for store in kept_stores(cache)}
    of_both = kind in ("source gone", "weights gone", "source changed")
    assert found == {chosen.name: state, other.name: state if of_both else ""}
    code, out, _ = run(capsys, "gc", "--cache-dir", cache, "--dry-run")
    assert code == 0 and f"{state}; would be removed" in out and len(kept_stores(cache)) == 2
    code, out, err = run(capsys, "gc", "--cache-dir", cache)
    assert code == 0 and out.count("removed") == 1 + of_both and err.startswith(f"{1 + of_both} of 2 packed models")
    assert [store.name for store in kept_stores(cache)] == ([] if of_both else [other.name])


def test_what_was_not_used_for_long_is_collected_on_request(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = kept_stores(cache)
    os.utime(first.path / "manifest.json", (time.time() - 86400 * 10,) * 2)
    run(capsys, "gc", "--cache-dir", cache)
    run(capsys, "gc", "--cache-dir", cache, "--older-than", 11)
    assert len(kept_stores(cache)) == 2
    run(capsys, "gc", "--cache-dir", cache, "--older-than", 9)
    assert [store.name for store in kept_stores(cache)] == [second.name]
    code, _, err = run(capsys, "gc", "--cache-dir", cache, "--older-than", "-1")
    assert code == 2 and "--older-than" in err


def test_a_moved_checkpoint_is_known_by_its_new_place(cache: Path) -> None:
    model = cache.with_name("model")
    moved = model.rename(model.with_name("moved"))
    assert {store.useless for store in kept_stores(cache)} == {"source gone"}
    before = time.time() - 5
    cached_store(moved, cache, "int8").close()
    found = {store.formats: store for store in kept_stores(cache)}
    assert (found["int8"].source, found["int8"].useless) == (str(moved), "") and found["int8"].used > before
    assert Manifest.read(found["int8"].path / "manifest.json").origin == str(moved)
    assert found["bf16"].useless == "source gone"


def test_words_that_are_no_command_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("frob",), ("rm",), ("ls", "--frob")):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
