"""A store that changes, or turns out to be damaged, while it is mapped: an error that names it, or no harm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import flip_bit, packed, write_checkpoint

from hybrid import LLM
from hybrid.errors import HybridError, WeightsError
from hybrid.weights import store as stores
from hybrid.weights.store import Store

ROOT = Path(__file__).parent.parent
SHARD = "layer-00001.safetensors"
TENSOR = "layers.1.ffn.experts"


@pytest.fixture(autouse=True)
def looks_before_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LOOK_SECONDS", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return packed(write_checkpoint(tmp_path / "model", "qwen3_moe")).path


@pytest.fixture
def large(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One that is not verified before it is used."""
    monkeypatch.setattr(stores, "ALWAYS_VERIFIED", 0)
    yield store
    assert not [thread for thread in threading.enumerate() if thread.name == "hybrid-verify"]


def other_weights(path: Path) -> None:
    flip_bit(path, -200)  # written in place, over what is mapped


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: os.truncate(path, 4096), "was cut to 4096 bytes while it was in use: .*--load copy"),
    "emptied": (lambda path: path.write_bytes(b""), "was cut to 0 bytes"),
    "other weights": (other_weights, f"was changed while it was in use .*{TENSOR} has a wrong checksum"),
}
NO_HARM: dict[str, Callable[[Path], object]] = {
    "touched": lambda path: os.utime(path),
    "written again": lambda path: path.write_bytes(path.read_bytes()),
    "removed": lambda path: path.unlink(),
    "folder removed": lambda path: shutil.rmtree(path.parent),
    "replaced": lambda path: os.replace(shutil.copy(path.with_name("outer.safetensors"), path.with_name("x")), path),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_mapped_shard_that_is_changed_in_place_is_an_error_that_names_it(store: Path, harm: str) -> None:
    change, message = HARM[harm]
    with LLM(store, threads=1) as llm:
        llm.logits([1, 2, 3])
        change(store / SHARD)
        for _ in range(2):
            with pytest.raises(WeightsError, match=f"{SHARD}: {message}"):
                llm.logits([1, 2, 3])


@pytest.mark.parametrize("change", NO_HARM)
def test_what_does_not_change_the_mapped_bytes_is_no_error(store: Path, change: str) -> None:
    with LLM(store, threads=1) as llm:
        expected = llm.logits([1, 2, 3])
        NO_HARM[change](store / SHARD)
        for _ in range(2):
            assert (llm.logits([1, 2, 3]) == expected).all()


CUT_IN_A_STEP = """
import os, sys
from pathlib import Path
from hybrid import LLM
from hybrid.errors import WeightsError
from hybrid.weights.store import Store

path, shard = Path(sys.argv[1]), Path(sys.argv[1]) / sys.argv[2]
sound = Store.require_sound
with LLM(path, threads=2) as llm:
    llm.logits([1, 2, 3])
    content = shard.read_bytes()
    # As late as can be: what comes before a step has been looked at already. Afterwards all is as it was.
    Store.require_sound = lambda store: (sound(store), os.truncate(shard, 0))
    for attempt in (1, 2):
        try:
            llm.logits([1, 2, 3])
        except WeightsError as error:
            print(error)
        Store.require_sound = sound
        shard.write_bytes(content)
with LLM(path, threads=2) as llm:
    print(llm.logits([1, 2, 3]).shape)
sys.stdout.flush()
os.kill(os.getpid(), 7)
"""


def test_a_shard_that_is_cut_in_the_middle_of_a_step_is_an_error(store: Path) -> None:
    """And SIGBUS for any other reason ends the process as ever."""
    command = [sys.executable, "-c", CUT_IN_A_STEP, store, SHARD]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    first, second, shape = result.stdout.splitlines()
    assert first == second and f"{SHARD}: was cut while it was read: open the model again" in first
    assert shape == "(3, 131)" and result.returncode == -signal.SIGBUS


def test_short_steps_do_not_look_at_files_each_time(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(store, threads=1) as llm:
        llm.logits([1, 2, 3])
        monkeypatch.setattr(stores, "LOOK_SECONDS", 1e9)
        os.truncate(store / SHARD, (store / SHARD).stat().st_size - 1)
        llm.logits([1, 2, 3])
        monkeypatch.setattr(stores, "LOOK_SECONDS", 0.0)
        for seconds in (0.0, 1e9):  # having found it, it looks again at once
            monkeypatch.setattr(stores, "LOOK_SECONDS", seconds)
            with pytest.raises(WeightsError, match="was cut"):
                llm.logits([1, 2, 3])


def test_copied_weights_do_not_care_about_their_files(store: Path) -> None:
    with LLM(store, threads=1, load="copy") as llm:
        expected = llm.logits([1, 2, 3])
        os.truncate(store / SHARD, 4096)
        assert (llm.logits([1, 2, 3]) == expected).all()


def test_a_large_store_is_verified_once_in_the_background(large: Path) -> None:
    with Store.open(large) as store:
        assert store.unverified
        store.verify_in_background()
        store._verification.wait()
        store.require_sound()
    with Store.open(large) as store:
        assert not store.unverified
        store.verify_in_background()
        assert store._verification._thread is None
    flip_bit(large / SHARD, -200)
    with Store.open(large) as store:
        assert store.unverified


def test_damage_that_the_background_finds_ends_the_next_step(large: Path) -> None:
    flip_bit(large / SHARD, -200)
    with LLM(large, threads=1) as llm:
        llm.engine.store._verification.wait()
        with pytest.raises(WeightsError, match=f"tensor {TENSOR} has a wrong checksum: pack the model again"):
            llm.logits([1, 2, 3])
    assert not (large / "verified.json").exists()


def test_damage_is_found_while_weights_are_copied(large: Path) -> None:
    flip_bit(large / SHARD, -200)
    with pytest.raises(WeightsError, match=f"tensor {TENSOR} has a wrong checksum"), LLM(large, threads=1, load="copy"):
        pass


def test_a_store_that_may_not_be_written_is_verified_too(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise WeightsError("read-only")

    monkeypatch.setattr("hybrid.weights.mapped.write_json", refuse)
    with Store.open(large) as store:
        store.verify_in_background()
        store._verification.wait()
        store.require_sound()
    with Store.open(large) as store:
        assert store.unverified


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": 5}'])
def test_a_damaged_note_of_verification_means_nothing(large: Path, content: str) -> None:
    (large / "verified.json").write_text(content)
    with Store.open(large) as store:
        assert store.unverified


def test_closing_ends_the_verification(large: Path) -> None:
    store = Store.open(large)
    store.verify_in_background()
    store.close()
    store.close()
    store.require_sound()
    assert not store._verification._thread.is_alive()  # type: ignore[union-attr]


def test_what_cannot_be_opened_leaves_no_descriptor(store: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    flip_bit(store / SHARD, -200)
    os.truncate(store / "outer.safetensors", 100)
    for _ in range(3):
        with pytest.raises(HybridError):
            Store.open(store)
    assert len(os.listdir("/proc/self/fd")) == before
