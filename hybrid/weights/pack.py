"""Packing a checkpoint into a store: shard by shard, resumable, and a store only once it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hybrid.errors import CapacityError, ConfigError, WeightsError
from hybrid.files import atomic_file, disk_errors, is_file
from hybrid.files.gguf import is_gguf
from hybrid.formats.mix import FormatMix, parse_mix
from hybrid.formats.packed import LAYOUT_VERSION
from hybrid.models.tensors import StoreTensor
from hybrid.weights.checkpoints.files import has_weights, may_read_weights
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.opening import describe_checkpoint, open_checkpoint
from hybrid.weights.companions import copy_companions
from hybrid.weights.content import Content
from hybrid.weights.kept import note_use
from hybrid.weights.manifest import MANIFEST, UNFINISHED, Manifest
from hybrid.weights.shard import checksum, gap, make_header, read_header
from hybrid.weights.source import source_fingerprint, source_place
from hybrid.weights.store import Store, is_outdated, is_store, read_manifest, shard_file

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all
Notice = Callable[[str], None]

_KEY_LETTERS, _LABEL_BYTES = 12, 100  # of the name of a cached store


def pack(
    checkpoint: Checkpoint,
    output: Path,
    mix: FormatMix | None = None,
    progress: Progress | None = None,
    check: bool = False,
    force: bool = False,
    notice: Notice | None = None,
) -> bool:
    """Write the store of `checkpoint` to the directory `output`; False when it already holds exactly that. One that
    another version of the program packed with other tensors is packed again.

    mix: the formats; None takes those in which the checkpoint is published.
    An interrupted run leaves no store that loads; the next one keeps the shards that were finished. `check`
    looks for values that are not finite, `force` replaces whatever store is there. A second process waits for
    the first and says so through `notice`. Raises `WeightsError`, `CapacityError` and `ConfigError`.
    """
    output = Path(output)
    checkpoint.check()
    _keep_freed_memory()
    notice = notice or (lambda line: None)
    for line in checkpoint.notes(mix or checkpoint.native):
        notice(line)
    with _locked_directory(output, checkpoint.path, notice):
        return _Packer(checkpoint, output, mix or checkpoint.native, progress, check, notice).run(force)


def cached_store(
    path: Path,
    cache_dir: Path | None = None,
    mix_text: str = "auto",
    progress: Progress | None = None,
    notice: Notice | None = None,
    check: bool = False,
) -> Store:
    """The store at `path`, or that of the checkpoint there, which is packed into the cache the first time.

    mix_text: the formats, as `parse_mix` reads them. Raises `ConfigError` when a packed store holds others.
    """
    path = Path(path)
    if _is_packed(path):
        _require_mix(path, mix_text)
        return Store.open(path, check)
    config, native = describe(path)
    mix, cache_dir = parse_mix(mix_text, native), cache_dir or default_cache_dir()
    if has_weights(path) and not may_read_weights(path) and (found := _store_of_place(path, cache_dir, config, mix)):
        return Store.open(found, check)
    target = _cached_path(path, cache_dir, mix)
    outdated = is_store(target) and is_outdated(target)
    if is_store(target) and not outdated:
        with suppress(WeightsError, CapacityError):  # the cache may be read-only: the model has the originals
            copy_companions(path, target, lambda line: None)
        note_use(target, path)
        return Store.open(target, check)
    checkpoint = open_checkpoint(path)
    _require_writable(target.parent)
    if notice:
        why = f"{target} has other tensors than this version needs: " * outdated
        notice(f"{why}packing {path} into {target}; this is done once, later starts map it")
    pack(checkpoint, target, mix, progress, check, notice=notice)
    return Store.open(target, check)


def model_config(path: Path) -> dict[str, Any]:
    """The contents of the config.json of a store or checkpoint, corrected where a checkpoint's tensors differ."""
    return describe(path)[0]


def model_formats(path: Path) -> FormatMix:
    """The formats of a store, or those in which a checkpoint is published."""
    return describe(path)[1]


def describe(path: Path) -> tuple[dict[str, Any], FormatMix]:
    """Both of the above. Of a checkpoint at most headers are read, unless it has a head beside tied embeddings."""
    if _is_packed(path):
        manifest = read_manifest(path)
        return manifest.config, manifest.mix
    return describe_checkpoint(path)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/hybrid, or ~/.cache/hybrid."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "hybrid"
    try:
        return Path.home() / ".cache" / "hybrid"
    except RuntimeError:
        raise ConfigError("no home directory to keep packed models in; give one with --cache-dir") from None


def _is_packed(path: Path) -> bool:
    """Whether it is a store, even one whose packing was not finished."""
    return is_store(path) or is_file(path / UNFINISHED)


def _require_mix(store: Path, mix_text: str) -> None:
    held = model_formats(store)
    wanted = parse_mix(mix_text, held)
    if wanted != held:
        raise ConfigError(
            f"{store}: the store holds {held}, --format {mix_text} asks for {wanted}: "
            "leave out --format, or give the checkpoint instead of the store"
        )


def _require_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(cache_dir, os.W_OK | os.X_OK, effective_ids=True) else "Permission denied"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason:
        raise ConfigError(
            f"the cache directory {cache_dir} cannot be written ({reason}), and packed models are kept there; "
            "give another one with --cache-dir"
        )


def _cached_path(path: Path, cache_dir: Path, mix: FormatMix) -> Path:
    """Where the store of a checkpoint is or is to be: found by its key alone, because a model may be renamed."""
    key = hashlib.sha256(f"{source_fingerprint(path)} {mix} {LAYOUT_VERSION}".encode()).hexdigest()[:_KEY_LETTERS]
    found = (place for place in sorted(cache_dir.glob(f"*-{key}")) if is_store(place))
    return next(found, cache_dir / f"{_label(path)}-{key}")


def _store_of_place(path: Path, cache_dir: Path, config: dict[str, Any], mix: FormatMix) -> Path | None:
    """The store of a checkpoint whose weights this user may not read, packed by somebody who may."""
    wanted = (source_place(path), config, mix)
    for file in sorted(cache_dir.glob(f"*/{MANIFEST}")):
        with suppress(WeightsError):
            found = Manifest.read(file)
            if (found.place, found.config, found.mix) == wanted:
                return file.parent
    return None


def _label(path: Path) -> str:
    """The name of a model: of its file or folder, or of its repository in the cache of the hub."""
    path = path.absolute() if is_gguf(path) else path.resolve()
    name = path.parent.parent.name.removeprefix("models--") if path.parent.name == "snapshots" else path.name
    return os.fsencode(name)[:_LABEL_BYTES].decode(errors="ignore") or "model"


def _keep_freed_memory() -> None:
    """Make the allocator keep small freed blocks: it keeps up to twice the largest block that was ever freed.

    Otherwise it gives back the intermediates of every chunk to the system and has them mapped and cleared anew for
    the next, which takes longer than quantising. Nothing is touched, so nothing is used.
    """
    np.empty(4 << 20, np.uint8)


class _Packer:
    """One run over one locked output directory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        output: Path,
        mix: FormatMix,
        progress: Progress | None,
        check: bool,
        notice: Notice,
    ) -> None:
        self._source, self._output = checkpoint.path, output
        self._content = Content(checkpoint, check)
        self._progress, self._notice = progress, notice
        tensors = checkpoint.spec.store_tensors(mix)
        self._shards = {
            shard_file(shard): list(group) for shard, group in groupby(tensors, key=lambda tensor: tensor.shard)
        }
        self._sizes = {file: _shard_bytes(tensors) for file, tensors in self._shards.items()}
        self._done_bytes, self._total_bytes = 0, sum(tensor.nbytes for tensor in tensors)
        source, place = source_fingerprint(self._source), source_place(self._source)
        self._manifest = Manifest(mix, checkpoint.config, source, {}, {}, place, str(self._source.resolve()))

    def run(self, force: bool) -> bool:
        if is_store(self._output) and not force:
            if not self._matches(self._output / MANIFEST):
                raise WeightsError(
                    f"{self._output}: already holds another store; replace it with --force or give another directory"
                )
            if not is_outdated(self._output):
                copy_companions(self._source, self._output, self._notice)
                (self._output / UNFINISHED).unlink(missing_ok=True)
                return False
            with disk_errors(self._output):  # shards that have the tensors of this version are kept
                (self._output / MANIFEST).replace(self._output / UNFINISHED)
        self._resume()
        self._check_space()
        self._discard_old()
        self._write_shards()
        self._require_unchanged()
        copy_companions(self._source, self._output, self._notice)
        self._manifest.write(self._output / MANIFEST)
        (self._output / UNFINISHED).unlink()
        return True

    def _matches(self, manifest: Path) -> bool:
        """Whether a manifest, finished or not, is of this source and these formats."""
        try:
            found = Manifest.read(manifest)
        except WeightsError:
            return False
        return (found.source, found.mix) == (self._manifest.source, self._manifest.mix)

    def _resume(self) -> None:
        """Keep the shards that an interrupted run finished, if their bytes are those it recorded."""
        unfinished = self._output / UNFINISHED
        if is_store(self._output) or not unfinished.is_file() or not self._matches(unfinished):
            return
        found = Manifest.read(unfinished)
        for file in self._shards:
            checksums = {tensor.name: found.tensors.get(tensor.name) for tensor in self._shards[file]}
            if file in found.shards and self._written_checksums(file) == checksums:
                self._record(file, {name: found.tensors[name] for name in checksums})
                self._advance(sum(tensor.nbytes for tensor in self._shards[file]))

    def _written_checksums(self, file: str) -> dict[str, int]:
        try:
            entries = read_header(self._output / file)
            return {tensor.name: checksum(entries[tensor.name]) for tensor in self._shards[file]}
        except (WeightsError, KeyError):
            return {}

    def _check_space(self) -> None:
        needed = sum(size for file, size in self._sizes.items() if file not in self._manifest.shards)
        replaced = [path for path in self._old_files() if path.name not in self._manifest.shards]
        free = shutil.disk_usage(self._output).free + sum(path.stat().st_size for path in replaced)
        if free < needed:
            raise CapacityError(
                f"{self._output}: packing needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free: "
                "free some space, or write elsewhere (--output-path, --cache-dir)"
            )

    def _discard_old(self) -> None:
        """The manifest goes first: from here on, what is there is no store until it is whole."""
        with disk_errors(self._output):
            (self._output / MANIFEST).unlink(missing_ok=True)
            for path in self._old_files():
                if path.name not in self._manifest.shards:
                    path.unlink()

    def _old_files(self) -> list[Path]:
        return [*self._output.glob("*.safetensors"), *self._output.glob("*.tmp")]

    def _write_shards(self) -> None:
        self._manifest.write(self._output / UNFINISHED)
        for file, tensors in self._shards.items():
            if file not in self._manifest.shards:
                with atomic_file(self._output / file) as target:
                    checksums = self._write_shard(target, tensors)
                self._record(file, checksums)
                self._manifest.write(self._output / UNFINISHED)

    def _require_unchanged(self) -> None:
        if source_fingerprint(self._source) != self._manifest.source:
            self._manifest.shards.clear()  # which of them are of the old weights, nobody knows
            self._discard_old()
            self._manifest.write(self._output / UNFINISHED)
            raise WeightsError(f"{self._source}: was changed while it was packed; start again when it is whole")

    def _write_shard(self, file: BinaryIO, tensors: list[StoreTensor]) -> dict[str, int]:
        file.write(_header(tensors))
        checksums = {}
        for tensor in tensors:
            crc = 0
            for chunk in self._content.chunks(tensor):
                data = chunk.reshape(-1).view(np.uint8).data
                crc = zlib.crc32(data, crc)
                file.write(data)
                self._advance(len(data))
            file.write(bytes(gap(tensor.nbytes)))
            checksums[tensor.name] = crc
        return checksums

    def _record(self, file: str, checksums: dict[str, int]) -> None:
        self._manifest.shards[file] = self._sizes[file]
        self._manifest.tensors.update(checksums)

    def _advance(self, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self._progress:
            self._progress("packing", self._done_bytes, self._total_bytes)


def _header(tensors: list[StoreTensor]) -> bytes:
    return make_header((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors)


def _shard_bytes(tensors: list[StoreTensor]) -> int:
    return len(_header(tensors)) + sum(tensor.nbytes + gap(tensor.nbytes) for tensor in tensors)


@contextmanager
def _locked_directory(output: Path, source: Path, notice: Notice) -> Iterator[None]:
    """Make `output` and hold its lock, one process at a time; remove it again if it stays empty."""
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
    try:
        with disk_errors(output):
            _refuse_foreign(output, source)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notice(f"another process is packing into {output}; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing it would not unlock what a forked process still has open
        os.close(descriptor)
        with suppress(OSError):
            output.rmdir()


def _refuse_foreign(output: Path, source: Path) -> None:
    """Never write among files of someone else."""
    if output.resolve() == source.resolve():
        raise WeightsError(f"{output}: is the checkpoint itself; give another directory for the store")
    if not _is_packed(output) and any(not path.name.endswith(".tmp") for path in output.iterdir()):
        raise WeightsError(f"{output}: holds other files and no store; give an empty or a new directory")
