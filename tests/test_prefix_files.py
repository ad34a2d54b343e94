"""Kept prompts on disk: the same bits after another start, and what is wrong with a file costs nothing but itself."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from dummy_engine import WATCHDOG
from steps import open_engine
from test_kept import run
from test_pool import chat

from hybrid.errors import CapacityError, ConfigError, WeightsError
from hybrid.files import atomic_file
from hybrid.formats.block import BLOCK, round_up
from hybrid.serving import prefix_files, prefix_reader
from hybrid.serving.prefix_files import SUFFIX, Part, PrefixFiles, digest
from hybrid.serving.scheduler import Scheduler

TOKENS = np.arange(20, dtype=np.int32)
PART = Part(
    digest(TOKENS[:0], 0), digest(TOKENS, 0), TOKENS, np.arange(64, dtype=np.uint8), np.arange(5, dtype=np.uint8)
)


def opened(folder: Path, limit: int = 1 << 20, mark: str = "m" * 64) -> PrefixFiles:
    return PrefixFiles(folder, mark, limit, token_bytes=2, state_bytes=5)


def written(folder: Path) -> Path:
    """The file of `PART`."""
    files = opened(folder)
    files.write([PART])
    files.close()
    (path,) = folder.rglob(f"*{SUFFIX}")
    return path


def test_what_is_written_is_read_after_another_start(tmp_path) -> None:
    written(tmp_path)
    files = opened(tmp_path)
    (entry,) = files.after(PART.start)
    part = files.read(entry)
    assert part is not None and all(map(np.array_equal, part.body, PART.body)) and (part.start, part.end)
    assert files.after(PART.end) == []
    files.close()
    other = opened(tmp_path, mark="n" * 64)  # of another model, in a folder of its own
    assert other.after(PART.start) == []
    other.close()
    assert len(list(tmp_path.rglob(f"*{SUFFIX}"))) == 1


def header_with(path: Path, **fields: Any) -> None:
    content = path.read_bytes()
    header = {**json.loads(content[:4096]), **fields}
    path.write_bytes(json.dumps(header).encode().ljust(4096) + content[4096:])


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "no header": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "another object": lambda path: path.write_bytes(b"[1]".ljust(4096) + path.read_bytes()[4096:]),
    "another version": lambda path: header_with(path, version=99),
    "another model": lambda path: header_with(path, mark="n" * 64),
    "many tokens": lambda path: header_with(path, tokens=1 << 60),
    "negative": lambda path: header_with(path, tokens=-1),
    "a text for a number": lambda path: header_with(path, keys="x"),
    "infinite": lambda path: header_with(path, state=float("inf")),
    "nested": lambda path: path.write_bytes(b"[" * 4096 + path.read_bytes()[4096:]),
    "no checksum": lambda path: header_with(path, checksum=None),
    "another place": lambda path: path.rename(path.with_name(f"{'0' * 32}-{PART.end}{SUFFIX}")),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_sound_is_not_used_and_said_in_one_line(tmp_path, caplog, damage: str) -> None:
    DAMAGE[damage](written(tmp_path))
    files = opened(tmp_path)
    assert all(files.read(entry) is None for start in (PART.start, "0" * 32) for entry in files.after(start))
    assert files.after(PART.start) == []
    if damage != "a directory":
        files.write([PART])
    files.close()
    assert len(caplog.records) == 1 and "\n" not in caplog.text.rstrip("\n")
    if damage != "a directory":
        again = opened(tmp_path)
        assert [again.read(entry) is not None for entry in again.after(PART.start)] == [True]
        again.close()


@pytest.mark.parametrize("place", [4096, 4100, 4096 + 80, 4096 + 80 + 64])
def test_a_byte_that_changed_is_found(tmp_path, caplog, place: int) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    files = opened(tmp_path)
    assert [files.read(entry) for entry in files.after(PART.start)] == [None]
    assert "its checksum is wrong" in caplog.text and not path.exists()
    files.close()


def chain(*ends: int) -> list[Part]:
    """Parts that follow each other, up to so many tokens."""
    starts = (0, *ends[:-1])
    return [
        Part(
            digest(TOKENS[:a], 0),
            digest(TOKENS[:b], 0),
            TOKENS[a:b],
            PART.keys[: 2 * round_up(b - a, BLOCK)],
            PART.state,
        )
        for a, b in zip(starts, ends, strict=True)
    ]


def test_what_could_not_wait_is_written_when_it_is_known(tmp_path, monkeypatch) -> None:
    """A prompt of any length comes to be in files, its beginning first."""
    parts = chain(4, 8, 12)
    monkeypatch.setattr(prefix_files, "MAX_PENDING", parts[0].nbytes + 1)
    files = opened(tmp_path)
    files.write(parts)
    for written_so_far in (1, 2, 3):
        files.flush()
        assert [len(files.after(part.start)) for part in parts] == [1] * written_so_far + [0] * (3 - written_so_far)
        files.write([], parts)
    files.close()


def test_files_of_a_beginning_that_is_known_are_used(tmp_path) -> None:
    """What follows it in other prompts must not have them removed."""
    first, second = chain(4, 8)
    other = Part(first.end, "other", TOKENS[8:12], second.keys, second.state)
    third = Part(first.end, "third", TOKENS[9:13], second.keys, second.state)
    size = 4096 + first.nbytes
    files = opened(tmp_path, limit=3 * size)
    for fresh in (first, second, other, third):
        files.write([fresh], [first] * (fresh is not first))
        files.flush()
    assert files.after(first.start) and {entry.end for entry in files.after(first.end)} == {"other", "third"}
    files.close()


def test_the_longest_unused_file_is_removed(tmp_path) -> None:
    parts = [
        Part(digest(TOKENS[:0], 0), digest(TOKENS[:n], 0), TOKENS[:n], PART.keys[:32], PART.state) for n in (14, 15, 16)
    ]
    files = opened(tmp_path, limit=2 * (4096 + 4 * 16 + 32 + 5))
    for part in parts[:2]:
        files.write([part])
    files.flush()
    files.use(next(entry for entry in files.after(PART.start) if len(entry.tokens) == 14))
    files.write([parts[2]])
    files.flush()
    assert sorted(len(entry.tokens) for entry in files.after(PART.start)) == [14, 16]
    files.close()
    smaller = opened(tmp_path, limit=5000)
    assert [len(entry.tokens) for entry in smaller.after(PART.start)] == [16] and len(
        list(tmp_path.rglob(f"*{SUFFIX}"))
    ) == 1
    smaller.close()


def test_a_full_disk_is_said_once_and_loses_nothing(tmp_path, caplog, monkeypatch) -> None:
    written(tmp_path)

    def full(path: Path) -> None:
        raise CapacityError(f"{path}: the disk is full (No space left on device); free some space")

    def write(count: int, at: float) -> int:
        """At such a time; how many files there are then."""
        now[0] = at
        files.write([Part(PART.start, digest(TOKENS[:count], 0), TOKENS[:count], PART.keys, PART.state)])
        files.flush()
        return len(files.after(PART.start))

    now, tried = [0.0], []
    monkeypatch.setattr(prefix_files, "monotonic", lambda: now[0])
    files = opened(tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(prefix_files, "atomic_file", lambda path: tried.append(now[0]) or full(path))
        assert [write(10, at) for at in (100, 109, 110, 129, 130, 169, 170)] == [1] * 7
        assert tried == [100, 110, 130, 170], "ever rarer"
    assert len(caplog.records) == 1 and "tried again in 10 s" in caplog.text and "the disk is full" in caplog.text
    (entry,) = files.after(PART.start)
    assert files.read(entry) is not None
    assert [write(10, 249), write(10, 250), write(12, 250)] == [1, 2, 3], "there is room again"
    assert len(caplog.records) == 2 and "kept prompts are written again" in caplog.text
    with monkeypatch.context() as disk:
        disk.setattr(prefix_files, "atomic_file", full)
        assert [write(14, at) for at in (251, 260)] == [3, 3] and len(caplog.records) == 3
    assert write(14, 261) == 4
    files.close()


def test_a_disk_with_room_for_small_files_alone_is_said_once(tmp_path, caplog, monkeypatch) -> None:
    def write(at: float, *counts: int) -> None:
        now[0] = at
        files.write([Part(PART.start, digest(TOKENS[:n], 0), TOKENS[:n], PART.keys, PART.state) for n in counts])
        files.flush()

    def nearly_full(path: Path) -> Any:
        if path.name.endswith(f"-{digest(TOKENS[:14], 0)}{SUFFIX}"):
            raise CapacityError(f"{path}: the disk is full; free some space")
        return atomic_file(path)

    now = [100.0]
    monkeypatch.setattr(prefix_files, "monotonic", lambda: now[0])
    files = opened(tmp_path)
    with monkeypatch.context() as disk:
        disk.setattr(prefix_files, "atomic_file", nearly_full)
        for at in (100, 1000, 2000, 3000):
            write(at, 10, 14)
            write(at + 700, 10)
    assert len(caplog.records) == 1, "files are written, and others are not, ever again"
    write(5000, 10, 14)
    assert len(caplog.records) == 2 and "written again" in caplog.text and len(files.after(PART.start)) == 2
    files.close()


def test_a_folder_has_one_owner_and_says_who(tmp_path) -> None:
    files = opened(tmp_path)
    with pytest.raises(ConfigError, match="is used by another model of this process; give each its own"):
        opened(tmp_path)
    files.close()
    opened(tmp_path).close()
    code = """
import sys
import threading
from pathlib import Path
from hybrid.files import FolderLock
lock = FolderLock(Path(sys.argv[1]), "--prefix-dir x")
print("held", flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, files_of(tmp_path)], **pipes, env=environment) as process:
        assert process.stdout and process.stdin and process.stdout.readline() == b"held\n"
        for said, owner in (
            (None, f"process {process.pid};"),
            (f"{process.pid} elsewhere", f"process {process.pid} on elsewhere;"),
            ("7 a\x1b[2J", r"process 7 on a\\u001b\[2J;"),
            ("\0\xff", "another process;"),
            ("", "another process;"),
        ):
            if said is not None:
                (files_of(tmp_path) / "lock").write_text(said)
            with pytest.raises(ConfigError, match=f"--prefix-dir {tmp_path} is used by {owner}"):
                opened(tmp_path)
        process.stdin.close()
    opened(tmp_path).close()


def test_a_folder_that_cannot_be_locked_is_said(tmp_path, monkeypatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(WeightsError, match=f"--prefix-dir {tmp_path}: .*No locks available"):
        opened(tmp_path)


def files_of(folder: Path) -> Path:
    """Where the files of one model are."""
    return next(path for path in folder.iterdir() if path.is_dir())


def test_who_is_abandoned_leaves_its_folder_to_another(tmp_path) -> None:
    """And touches nothing in it when it comes back."""
    written(tmp_path)
    first = opened(tmp_path)
    first.abandon()
    second = opened(tmp_path)
    (entry,) = second.after(PART.start)
    assert first.after(PART.start) == []
    entry.path.write_bytes(b"damaged")
    assert first.read(entry) is None and entry.path.exists()
    first.write(chain(4))
    first.close()
    second.write(chain(8))
    second.close()
    third = opened(tmp_path)
    assert [len(entry.tokens) for entry in third.after(PART.start)] == [8]
    third.close()


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_not_sound(tmp_path) -> None:
    code = """
import sys
import threading
from pathlib import Path
import numpy as np
from hybrid.serving.prefix_files import Part, PrefixFiles, digest
files = PrefixFiles(Path(sys.argv[1]), "m" * 64, 1 << 30, 2000, 5)
print("writing", flush=True)
for first in range(100000):
    tokens = np.arange(first, first + 16, dtype=np.int32)
    keys, state = np.zeros(32000, np.uint8), np.zeros(5, np.uint8)
    files.write([Part(digest(tokens[:0], 0), digest(tokens, 0), tokens, keys, state)])
    files.flush()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout and process.stdout.readline() == b"writing\n"
            while not list(tmp_path.rglob(f"*{SUFFIX}")):
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
    files = PrefixFiles(tmp_path, "m" * 64, 1 << 30, 2000, 5)
    entries = files.after(PART.start)
    assert entries and all(files.read(entry) for entry in entries)
    assert not list(tmp_path.rglob("*.tmp"))
    files.close()


RECURRENT = ("lfm2", "qwen3_next", "granitemoehybrid", "kimi_linear", "deepseek_v4")
CASES = {
    "mixtral": ("mixtral", {}),
    "keys and values in int8": ("mixtral", {"kv_format": "int8"}),
    "short convolutions": ("lfm2", {}),
    "gated delta rule": ("qwen3_next", {}),
    "state spaces": ("granitemoehybrid", {}),
    "Kimi Delta Attention": ("kimi_linear", {}),
    "compressed tokens": ("deepseek_v4", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_another_start_has_the_bits_of_what_is_computed(tmp_path, case: str) -> None:
    family, choices = CASES[case]
    random = np.random.default_rng(9)
    system, first, second = ([10, *random.integers(12, 131, count).tolist()] for count in (60, 30, 25))
    prompts = [[*system, *said, 10, 12] for said in (first, second)]
    path = write_checkpoint(tmp_path / "model", family)
    answers, cached = [], []
    for start in range(3):  # the last one without files
        folder = tmp_path / "prefixes" if start < 2 else None
        with open_engine(path, tmp_path / "cache", max_seq_len=256, prefix_dir=folder, **choices) as engine:
            scheduler = Scheduler(engine)
            for prompt in prompts:
                (entry,) = run(scheduler, chat(prompt, 9, folder is not None, ignore_eos=True, logprobs=131))
                answers.append((entry.completion.token_ids, entry.completion.logprobs))
                cached.append(entry.completion.cached_tokens)
            scheduler.forget()
            scheduler.close()
    known = [len(prompt) - 2 if family in RECURRENT else (len(prompt) - 1) // 16 * 16 for prompt in prompts]
    assert cached[0] == 0 < cached[1] <= 61 and cached[2:] == [*known, 0, 0]
    assert answers[:2] == answers[2:4] == answers[4:]


@pytest.fixture
def kept_on_disk(tmp_path):
    """A model that is opened anew, and a prompt whose beginning is in files."""
    path, prompt = write_checkpoint(tmp_path / "model", "mixtral"), [10, *range(20, 120)]
    choices = {"max_seq_len": 256, "max_batch": 2, "prefix_dir": tmp_path / "prefixes"}
    with open_engine(path, tmp_path / "cache", **choices) as engine:
        scheduler = Scheduler(engine)
        run(scheduler, chat(prompt, 1))
        scheduler.close()
    with open_engine(path, tmp_path / "cache", **choices) as engine:
        yield Scheduler(engine), prompt


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """Nothing is read of files until it is set."""
    ready, read = threading.Event(), PrefixFiles.read

    def slowly(files: PrefixFiles, *given: Any) -> Part | None:
        assert threading.current_thread().name == "hybrid-prefix-reader" and ready.wait(WATCHDOG)
        return read(files, *given)

    monkeypatch.setattr(PrefixFiles, "read", slowly)
    return ready


def test_whose_prompt_is_read_from_files_waits_and_others_go_on(kept_on_disk, slow_disk) -> None:
    scheduler, prompt = kept_on_disk
    waits, goes_on, behind = (chat(tokens, 9, ignore_eos=True) for tokens in (prompt, [1, 2, 3], [4, 5, 6]))
    scheduler.add(goes_on, waits, behind)
    while not goes_on.finished:
        scheduler.step()
    assert waits.sequence is behind.sequence is None, "the place of the one who waits is kept"
    assert scheduler.step() == [behind]
    slow_disk.set()
    while scheduler.has_work:
        scheduler.step()
    assert (waits.completion.cached_tokens, goes_on.completion.cached_tokens) == (96, 0)
    scheduler.close()


def test_who_is_cancelled_while_files_are_read_makes_room(kept_on_disk, slow_disk) -> None:
    scheduler, prompt = kept_on_disk
    first, waits, behind = (chat(tokens, 30, ignore_eos=True) for tokens in ([1, 2, 3], prompt, [4, 5, 6]))
    scheduler.add(first, waits, behind)
    scheduler.step()
    scheduler.cancel(waits)
    scheduler.step()
    assert behind.sequence is not None
    slow_disk.set()
    while scheduler.has_work:
        scheduler.step()
    scheduler.close()


def test_a_disk_that_does_not_answer_is_not_waited_for(kept_on_disk, slow_disk, monkeypatch) -> None:
    scheduler, prompt = kept_on_disk
    first = chat(prompt, 2)
    scheduler.add(first)
    for _ in range(3):
        assert scheduler.step() == [] and first.sequence is None
    monkeypatch.setattr(prefix_reader, "PATIENCE", 0)
    run(scheduler, chat([*prompt, 5], 2))
    assert first.finished and first.completion.cached_tokens == 0
    slow_disk.set()
    scheduler.close()


def test_what_is_read_and_what_is_kept_have_the_room_together(kept_on_disk, monkeypatch) -> None:
    """Reading may have what is free, or a quarter of all, for which what was used longest ago gives way."""
    scheduler, prompt = kept_on_disk
    pool, asked, shrunk = scheduler._admission.pool, list[prefix_reader.Wanted](), list[int]()
    monkeypatch.setattr(prefix_reader.PrefixReader, "begin", lambda reader, wanted: asked.append(wanted))
    monkeypatch.setattr(type(pool), "shrink", lambda pool, room: shrunk.append(room))
    tokens = np.array(prompt, np.int32)
    for held, wanted in ((0, 1000), (300, 700), (900, 250)):
        pool.nbytes = held
        assert pool.fetch(tokens, 0, 1000, begin=True)
        assert asked[-1].nbytes == wanted and shrunk[-1] == 1000 - wanted
    pool.nbytes = 0
    scheduler.close()


def test_a_reader_that_fails_says_so_and_goes_on(kept_on_disk, monkeypatch, caplog) -> None:
    scheduler, prompt = kept_on_disk
    read, failed = PrefixFiles.read, list[bool]()

    def fails_once(files: PrefixFiles, *given: Any) -> Part | None:
        if not failed:
            failed.append(True)
            raise KeyError("gone")
        return read(files, *given)

    monkeypatch.setattr(PrefixFiles, "read", fails_once)
    run(scheduler, first := chat(prompt, 1))
    assert first.completion.cached_tokens == 0 and "a kept prompt was not read: 'gone'" in caplog.text
    scheduler.forget()
    run(scheduler, again := chat([*prompt, 5], 1))
    assert again.completion.cached_tokens == 96
    scheduler.close()
