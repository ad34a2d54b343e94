"""Packing leaves a whole store or none: resumed, locked, within memory and disk, and done once for the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DTYPES, flip_bit, random_tensors, write_checkpoint, write_tensors
from configs import CONFIGS

from hybrid.errors import CapacityError, HybridError, WeightsError
from hybrid.formats.mix import MIXES
from hybrid.models.layers.indexed import IndexedAttention
from hybrid.models.layers.latent import LatentAttention
from hybrid.weights import pack as packing
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import cached_store, pack
from hybrid.weights.store import Store

_ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds until a test that hangs fails


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_found_on_request(tmp_path: Path, dtype: str, value: float) -> None:
    tensors = random_tensors(CONFIGS["qwen3_moe"], dtype)
    name = "model.layers.0.mlp.experts.9.down_proj.weight"
    tensors[name][5, 7] = value
    source = write_tensors(tmp_path / "hf", CONFIGS["qwen3_moe"], tensors)
    with pytest.raises(WeightsError, match=f"tensor {name} holds NaN or infinity"):
        pack(Checkpoint.open(source), tmp_path / "store", check=True)
    pack(Checkpoint.open(source), tmp_path / "store")
    Store.open(tmp_path / "store").close()
    with pytest.raises(WeightsError, match="tensor layers.0.ffn.experts holds NaN or infinity"):
        Store.open(tmp_path / "store", check=True)


@pytest.mark.parametrize("interrupted_after", range(5))
def test_an_interrupted_run_leaves_no_store_and_is_resumed(tmp_path: Path, interrupted_after: int) -> None:
    """A run stopped in each shard: what was finished is kept, and the result is that of an undisturbed run."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "qwen3_moe"))
    pack(checkpoint, tmp_path / "whole")
    store = tmp_path / "store"

    def interrupt(what: str, done: int, total: int) -> None:
        if len(list(store.glob("*.safetensors"))) == interrupted_after:
            raise KeyboardInterrupt

    finished: dict[str, int] = {}
    if interrupted_after < 4:
        with pytest.raises(KeyboardInterrupt):
            pack(checkpoint, store, progress=interrupt)
        assert not list(store.glob("*.tmp"))
        with pytest.raises(WeightsError, match="not finished: run hybrid pack again"):
            cached_store(store)
        finished = {file.name: file.stat().st_ino for file in store.glob("*.safetensors")}
        assert len(finished) == interrupted_after

    steps: list[tuple[int, int]] = []
    pack(checkpoint, store, progress=lambda what, done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)
    assert not (store / "packing.json").exists()
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert (store / file.name).read_bytes() == file.read_bytes()
        assert finished.get(file.name, (store / file.name).stat().st_ino) == (store / file.name).stat().st_ino


def test_a_finished_shard_that_changed_is_written_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "qwen3_moe"))
    _interrupt(checkpoint, tmp_path / "store", after=2)
    flip_bit(tmp_path / "store/layer-00000.safetensors", -100)
    pack(checkpoint, tmp_path / "store")
    Store.open(tmp_path / "store", check=True).close()


def test_shards_of_another_source_are_not_kept(tmp_path: Path) -> None:
    _interrupt(Checkpoint.open(write_checkpoint(tmp_path / "hf", "qwen3_moe")), tmp_path / "store", after=2)
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", "qwen3_moe", dtype="fp32"))
    pack(other, tmp_path / "store")
    pack(other, tmp_path / "whole")
    assert (tmp_path / "store/outer.safetensors").read_bytes() == (tmp_path / "whole/outer.safetensors").read_bytes()
    assert (tmp_path / "store/layer-00000.safetensors").read_bytes() == (
        tmp_path / "whole/layer-00000.safetensors"
    ).read_bytes()


def test_shards_in_other_formats_are_not_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "qwen3_moe"))
    _interrupt(checkpoint, tmp_path / "store", after=2)
    pack(checkpoint, tmp_path / "store", MIXES["int8"])
    with Store.open(tmp_path / "store", check=True) as store:
        assert store.mix == MIXES["int8"]


def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from hybrid.weights.checkpoints.huggingface import Checkpoint; from hybrid.weights.pack import pack\n"
        "store = Path(sys.argv[2])\n"
        "def kill(*_):\n"
        "    if len(list(store.glob('*.safetensors'))) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "pack(Checkpoint.open(Path(sys.argv[1])), store, progress=kill)\n"
    )
    subprocess.run([sys.executable, "-c", script, source, tmp_path / "store"], check=False, cwd=_ROOT)
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2
    with pytest.raises(WeightsError, match="not finished"):
        Store.open(tmp_path / "store")
    pack(Checkpoint.open(source), tmp_path / "store")
    Store.open(tmp_path / "store", check=True).close()
    assert not list((tmp_path / "store").glob("*.tmp"))


def test_two_processes_may_pack_the_same_store(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    script = (
        "import sys; from pathlib import Path; from hybrid.weights.pack import cached_store\n"
        "cached_store(Path(sys.argv[1]), Path(sys.argv[2]), check=True).close()\n"
    )
    command = [sys.executable, "-c", script, source, tmp_path / "cache"]
    processes = [subprocess.Popen(command, cwd=_ROOT) for _ in range(2)]
    assert [process.wait(PATIENCE) for process in processes] == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_store_that_is_being_packed_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "llama"))
    (tmp_path / "store").mkdir()
    descriptor = os.open(tmp_path / "store", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    lines: list[str] = []

    def release(line: str) -> None:
        lines.append(line)
        os.close(descriptor)

    assert pack(checkpoint, tmp_path / "store", notice=release)
    assert len(lines) == 1 and "another process is packing" in lines[0]


def test_a_finished_store_is_left_alone_and_another_is_not_overwritten(tmp_path: Path) -> None:
    first = Checkpoint.open(write_checkpoint(tmp_path / "hf", "llama"))
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", "qwen3"))
    store = tmp_path / "store"
    assert pack(first, store)
    inode = (store / "outer.safetensors").stat().st_ino
    assert not pack(first, store)
    assert (store / "outer.safetensors").stat().st_ino == inode
    with pytest.raises(WeightsError, match="already holds another store.*--force"):
        pack(other, store)
    assert Store.open(store).spec == first.spec
    assert pack(other, store, force=True)
    assert Store.open(store, check=True).spec == other.spec


def test_a_store_with_the_tensors_of_another_version_is_packed_again(tmp_path: Path, monkeypatch) -> None:
    """In the cache and by itself; what has stayed the same is kept."""
    source, lines = write_checkpoint(tmp_path / "hf", "deepseek_v32"), list[str]()
    checkpoint, store = Checkpoint.open(source), tmp_path / "store"
    with monkeypatch.context() as older:
        older.setattr(IndexedAttention, "store_tensors", LatentAttention.store_tensors)
        pack(checkpoint, store)
        cached = cached_store(source, tmp_path / "cache").path
    for path in (store, cached):
        with pytest.raises(WeightsError, match="the manifest lists other tensors than its model has"):
            Store.open(path)
    inode = (store / "outer.safetensors").stat().st_ino
    assert pack(checkpoint, store) and not pack(checkpoint, store)
    assert (store / "outer.safetensors").stat().st_ino == inode
    with Store.open(store, check=True) as new, cached_store(source, tmp_path / "cache", notice=lines.append) as again:
        assert again.path == cached and again.content == new.content
        assert any(".indexer." in name for name in again.tensors)
    assert len(lines) == 1 and f"{cached} has other tensors than this version needs: packing {source} into" in lines[0]


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama")
    with pytest.raises(WeightsError, match="is the checkpoint itself"):
        pack(Checkpoint.open(source), source)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/letter.txt").touch()
    with pytest.raises(WeightsError, match="holds other files and no store"):
        pack(Checkpoint.open(source), tmp_path / "docs")
    with pytest.raises(WeightsError, match="cannot be written"):
        pack(Checkpoint.open(source), tmp_path / "docs/letter.txt")
    assert [file.name for file in (tmp_path / "docs").iterdir()] == ["letter.txt"]


def test_nothing_is_written_for_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["qwen3_moe"])
    del tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
    source = write_tensors(tmp_path / "hf", CONFIGS["qwen3_moe"], tensors)
    with pytest.raises(WeightsError, match="experts.7.up_proj.weight is missing"):
        pack(Checkpoint.open(source), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_too_little_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "qwen3_moe"))
    usage = packing.shutil._ntuple_diskusage(10**12, 10**12 - 1000, 1000)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CapacityError, match=r"needs 0.00 GB of disk, 0.00 GB are free"):
        pack(checkpoint, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_disk_that_fills_up_leaves_no_partial_file(tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk, with the error number changed."""
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    script = (
        "import errno, resource, signal, sys; from pathlib import Path\n"
        "from hybrid.errors import CapacityError; from hybrid.weights.checkpoints.huggingface import Checkpoint\n"
        "from hybrid.weights.pack import pack\n"
        "errno.ENOSPC = errno.EFBIG\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: pack(Checkpoint.open(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "except CapacityError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, source, tmp_path / "store"]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    assert "layer-00000.safetensors: the disk is full" in result.stdout
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == ["outer.safetensors", "packing.json"]


def test_a_checkpoint_is_packed_into_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "model", "qwen3_moe")
    (source / "chat_template.jinja").write_text("old")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines: list[str] = []
    with cached_store(source, notice=lines.append) as store:
        assert store.path.parent == tmp_path / "cache/hybrid" and store.path.name.startswith("model-")
    assert len(lines) == 1 and str(store.path) in lines[0]

    (source / "chat_template.jinja").write_text("newer")
    monkeypatch.setattr(Checkpoint, "open", lambda path: pytest.fail("the weights were read again"))
    with cached_store(source, notice=lines.append) as again:
        assert again.path == store.path and len(lines) == 1
    assert (store.path / "chat_template.jinja").read_text() == "newer"


def test_a_changed_checkpoint_is_packed_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "qwen3_moe")
    first = cached_store(source, tmp_path / "cache").path
    os.utime(source / "model.safetensors", (1, 1))
    assert cached_store(source, tmp_path / "cache").path != first


def test_a_dangling_link_to_weights_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama", shards=2)
    shard = source / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match="model-00002-of-00002.safetensors: named in .* but missing"):
        cached_store(source, tmp_path / "cache")


def test_neither_store_nor_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HybridError, match="no such directory"):
        cached_store(tmp_path / "missing", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


IN_TURN = """
import sys, tracemalloc
from concurrent.futures import Future
from pathlib import Path
from hybrid.weights import content
from hybrid.formats.mix import MIXES
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import pack

class InTurn:
    def __init__(self, threads): pass
    def shutdown(self, **_): pass
    def submit(self, task):
        done = Future()
        done.set_result(task())
        return done

content.THREADS, content.ThreadPoolExecutor = 2, InTurn
checkpoint = Checkpoint.open(Path(sys.argv[1]))
tracemalloc.start()
pack(checkpoint, Path(sys.argv[2]), MIXES[sys.argv[3]])
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "hf"
    return write_checkpoint(folder, "llama", dtype="fp32", vocab_size=65536, intermediate_size=40000)


@pytest.mark.parametrize("mix", MIXES)
def test_packing_needs_little_memory(tmp_path: Path, large: Path, mix: str) -> None:
    """Less than a matrix of 15 MB of the checkpoint's 117 MB, and what is made ahead is all there: tasks have one
    thread, because with several it would depend on luck who meets whom. fp8 has scales for 128 rows, here 96 rows of
    40000; fp8_row and nvfp4 are made of 16 whole rows at a time.
    """
    command = [sys.executable, "-c", IN_TURN, large, tmp_path / "store", mix]
    peak = int(subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout)
    assert peak < {"fp8": 36_000_000, "fp8_row": 19_000_000, "nvfp4": 19_000_000}.get(mix, 14_000_000)


def _interrupt(checkpoint: Checkpoint, store: Path, after: int) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if len(list(store.glob("*.safetensors"))) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, store, progress=interrupt)
