"""Files that are read and written: what is replaced, written through or refused, and that nothing hangs."""

from __future__ import annotations

import io
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.errors import CapacityError, ConfigError, HybridError
from hybrid.files import (
    FileKind,
    Reading,
    atomic_file,
    check_output,
    csv_kind,
    input_file,
    open_output,
    output_file,
    parse_json,
    read_file,
    read_json_object,
)
from hybrid.plan.resolve import EMBEDDED_MODEL
from hybrid.text.chat_template import load_template
from hybrid.text.tokenizer import load_tokenizer

OURS = csv_kind(("step", "rows", "seconds"))
NEW = b"step,rows,seconds\n"
FEW = Reading(1000, "give another")


def write(path: Path, kind: FileKind | None = OURS) -> None:
    """As a command does: the check before a model is loaded, the file at the end."""
    check_output("--csv", path, kind)
    with output_file(path, kind) as file:
        file.write(NEW)


def refused(path: Path, words: str, kind: FileKind | None = OURS) -> None:
    with pytest.raises(ConfigError, match=words):
        check_output("--csv", path, kind)
    with pytest.raises(ConfigError, match=words), output_file(path, kind):
        pytest.fail("it was opened")


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_new_file_has_the_permissions_of_new_files(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "a.csv")
    finally:
        os.umask(before)
    assert (tmp_path / "a.csv").read_bytes() == NEW and names(tmp_path) == {"a.csv"}
    assert stat.S_IMODE((tmp_path / "a.csv").stat().st_mode) == 0o640


@pytest.mark.parametrize("old", [b"", b"step,rows\n1,2\n", b"\xef\xbb\xbfstep,token,rows,mhz\n"])
def test_a_file_of_ours_is_replaced_and_keeps_its_permissions(tmp_path, old: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(old)
    path.chmod(0o604)
    write(path)
    assert path.read_bytes() == NEW and stat.S_IMODE(path.stat().st_mode) == 0o604


@pytest.mark.parametrize("old", [b"dear diary\n", b"name,step,age,place\n", b"\x7fELF", b"PAR1", b"{}"])
def test_a_file_of_another_kind_is_kept(tmp_path, old: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(old)
    refused(path, "something else than a CSV with the columns step, rows")
    assert path.read_bytes() == old and names(tmp_path) == {"a.csv"}


def test_links_are_followed_to_their_target(tmp_path) -> None:
    (tmp_path / "far").mkdir()
    for at, name in enumerate(("one", "two", "three")):
        (tmp_path / name).symlink_to(("far/real.csv", "one", tmp_path / "two")[at])
    write(tmp_path / "three")  # what is not there yet is made where the links lead
    target = tmp_path / "far" / "real.csv"
    assert target.read_bytes() == NEW and names(tmp_path / "far") == {"real.csv"}
    target.write_bytes(b"step\n")
    write(tmp_path / "two")
    assert target.read_bytes() == NEW and (tmp_path / "one").is_symlink() and (tmp_path / "three").is_symlink()


def test_what_cannot_be_a_file_is_refused(tmp_path) -> None:
    refused(tmp_path, "is a directory")
    refused(Path("/"), "is a directory")
    refused(tmp_path / "missing" / "a.csv", "there is no directory .*missing")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "a.csv")
    refused(tmp_path / "dangling", "there is no directory .*gone")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "symbolic links")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "a.csv", "Not a directory")


def test_a_folder_or_a_file_that_is_protected_is_refused(tmp_path, monkeypatch) -> None:
    """As for somebody who is not root, whom nothing is protected from."""

    def access(path: Path, mode: int) -> bool:
        return not mode & os.W_OK or bool(os.stat(path).st_mode & stat.S_IWUSR)

    monkeypatch.setattr(os, "access", access)
    (tmp_path / "kept.csv").write_bytes(b"step\n")
    (tmp_path / "kept.csv").chmod(0o444)
    refused(tmp_path / "kept.csv", "protected against writing")
    tmp_path.chmod(0o555)
    refused(tmp_path / "a.csv", "cannot be written")
    tmp_path.chmod(0o755)
    assert names(tmp_path) == {"kept.csv"}


def test_an_exception_leaves_what_was_there(tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"step\n")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), output_file(path, OURS) as file:
            file.write(NEW)
            raise error
    with pytest.raises(CapacityError, match="full"), output_file(path, OURS):
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"step\n" and names(tmp_path) == {"a.csv"}


def test_the_unfinished_file_is_nobody_elses(tmp_path) -> None:
    """Neither is a file with an obvious name overwritten, nor a link with one followed."""
    (tmp_path / "a.csv.tmp").write_bytes(b"mine")
    (tmp_path / "b.csv.tmp").symlink_to(tmp_path / "a.csv.tmp")
    for name in ("a.csv", "b.csv"):
        write(tmp_path / name)
    with atomic_file(tmp_path / "a.csv") as file:
        file.write(b"again")
    assert (tmp_path / "a.csv.tmp").read_bytes() == b"mine"
    write(tmp_path / ("x" * 251 + ".csv"))


def test_a_store_never_follows_a_link(tmp_path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "store").symlink_to("elsewhere")
    with atomic_file(tmp_path / "store") as file:
        file.write(b"ours")
    assert (tmp_path / "elsewhere").read_bytes() == b"mine" and not (tmp_path / "store").is_symlink()


def test_a_mounted_file_keeps_its_place(tmp_path, monkeypatch) -> None:
    def busy(source: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    path = tmp_path / "a.csv"
    path.write_bytes(b"step\n" * 9)
    place = path.stat().st_ino
    monkeypatch.setattr(os, "replace", busy)
    write(path)
    assert path.read_bytes() == NEW and path.stat().st_ino == place and names(tmp_path) == {"a.csv"}


@pytest.fixture
def pipe(tmp_path) -> Iterator[Path]:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_pipe_is_written_through_if_somebody_reads_it(pipe, tmp_path) -> None:
    with pytest.raises(ConfigError, match="nobody reads this pipe"):
        write(pipe)
    (tmp_path / "link").symlink_to("pipe")
    for path in (pipe, tmp_path / "link"):
        found: list[bytes] = []
        reader = threading.Thread(target=lambda found=found: found.append(pipe.read_bytes()))
        reader.start()
        while not found:
            try:
                write(path)
            except ConfigError:  # the reader has not begun
                continue
            reader.join(60)
        assert found == [NEW]


def test_a_reader_that_leaves_is_an_error_of_the_file(pipe) -> None:
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    new = open_output(pipe)
    os.close(reader)
    new.file.write(NEW)
    with pytest.raises(OSError, match="Broken pipe"):
        new.commit()
    new.discard()


def test_a_descriptor_is_written_where_it_stands(tmp_path) -> None:
    """/dev/stdout of `hybrid run > file` is a regular file that others write to, too."""
    with open(tmp_path / "log", "wb", buffering=0) as log:
        log.write(b"before\n")
        (tmp_path / "out").symlink_to(f"/dev/fd/{log.fileno()}")
        (tmp_path / "again").symlink_to("out")
        for path in (Path(f"/dev/fd/{log.fileno()}"), Path(f"/proc/self/fd/{log.fileno()}"), tmp_path / "again"):
            write(path)
        log.write(b"after\n")
    assert (tmp_path / "log").read_bytes() == b"before\n" + 3 * NEW + b"after\n"
    assert names(tmp_path) == {"log", "out", "again"}
    with open(tmp_path / "log", "rb") as log:
        path = Path(f"/dev/fd/{log.fileno()}")
        refused(path, "open for reading alone")
    refused(path, "Bad file descriptor")


def test_a_terminal_is_written_through(tmp_path) -> None:
    main, terminal = os.openpty()
    write(Path(os.ttyname(terminal)))
    assert os.read(main, 100).replace(b"\r\n", b"\n") == NEW
    os.close(main)
    os.close(terminal)


def test_reading_is_bounded_before_it_begins(tmp_path) -> None:
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"huge: has 1,099,512 MB, 0 are allowed; give another"):
        read_file(path, FEW)
    path.write_bytes(b"x" * 1000)
    assert read_file(path, FEW) == b"x" * 1000
    with input_file(path, FEW) as file:
        path.write_bytes(b"x" * 5000)  # while it is read
        with pytest.raises(ConfigError, match="longer than"):
            file.read()


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom"])
def test_an_endless_device_is_read_to_the_limit_or_not_at_all(name: str) -> None:
    with pytest.raises(ConfigError, match="longer than"):
        read_file(Path(name), FEW)
    with pytest.raises(HybridError, match="is a device and no regular file"):
        read_json_object(Path(name))
    assert read_file(Path("/dev/null"), FEW) == b""


def test_a_pipe_without_a_writer_is_not_waited_for(pipe) -> None:
    assert read_file(pipe, FEW) == b""
    with pytest.raises(HybridError, match="is a pipe and no regular file"):
        read_json_object(pipe)
    with pytest.raises(HybridError, match="is a directory and no regular file"):
        read_json_object(pipe.parent)


def test_a_process_substitution_is_read(tmp_path) -> None:
    out, into = os.pipe()
    os.write(into, b"text")
    os.close(into)
    (tmp_path / "link").symlink_to(f"/dev/fd/{out}")
    assert read_file(tmp_path / "link", FEW) == b"text"
    with open(out, "rb"):
        assert read_file(Path(f"/dev/fd/{out}"), FEW) == b""


def test_links_to_nowhere_and_loops_are_errors(tmp_path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="symbolic links"):
        read_file(tmp_path / "loop", FEW)
    with pytest.raises(ConfigError, match="no such file"):
        read_file(tmp_path / "gone", FEW)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 100_000, '{"a": \ud800}', b"\xff\xfe\x00"])
def test_json_that_is_none_is_a_named_error(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="is not valid JSON"):
        parse_json(text, Path("x"), FEW)


def test_json_with_a_byte_order_mark_is_json(tmp_path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json_object(tmp_path / "a.json") == {"a": 1}
    assert parse_json(io.BytesIO("﻿[1]".encode()).read(), Path("x"), FEW) == [1]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["endless", "pipe", "nowhere", "huge"])
def test_files_of_a_model_are_regular_and_bounded(tmp_path, name: str, kind: str) -> None:
    """Neither waited for nor read to the end of memory; a link to nowhere is no file of settings that may lack."""
    if kind == "nowhere" and name in ("tokenizer.json", "chat_template.jinja"):
        pytest.skip("another file may stand for it")
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to("/dev/zero" if kind == "endless" else "gone")
    words = {"endless": "is a device", "pipe": "is a pipe", "nowhere": "no such file", "huge": "are allowed"}[kind]
    with pytest.raises(HybridError, match=words):
        read_json_object(path) if name == "config.json" else LOADERS[name](folder)


LOADERS = {
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_template,
    "chat_template.jinja": load_template,
}
