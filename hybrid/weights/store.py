"""The packed store: a directory of aligned safetensors shards under a manifest, mapped into memory."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from hybrid.errors import WeightsError
from hybrid.files import is_file
from hybrid.formats import FORMATS
from hybrid.formats.block import Bytes, all_finite
from hybrid.formats.packed import matrix_formats
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import StoreTensor
from hybrid.weights.manifest import MANIFEST, UNFINISHED, Manifest
from hybrid.weights.mapped import MappedFile, Stamp, Verification, damaged
from hybrid.weights.shard import ALIGNMENT, Entry, read_header

ALWAYS_VERIFIED = 1 << 30  # bytes: up to here verifying costs less than a second

LOOK_SECONDS = 0.1  # between two looks at the sizes and times of files that are mapped
_ADVICE = "open the model again; --load copy keeps weights where nobody changes them"
_DTYPES: dict[str, npt.DTypeLike] = {"U8": np.uint8, "F32": np.float32}
_FINITE_BYTES = 1 << 24  # looked at together, so that a check needs little memory


class Store:
    """The tensors of a packed store as read-only views of mapped files; a context manager.

    spec: the model. mix: the formats of its parts; format: the same, to be read. nbytes: of all tensors. Many
    processes may open it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.mix = manifest.mix
        self.format = str(manifest.mix)
        self.spec: ModelSpec = model_spec(manifest.config)
        self.tensors = {tensor.name: tensor for tensor in self.spec.store_tensors(self.mix)}
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self._config, self._checksums = manifest.config, manifest.tensors
        self._files: dict[str, MappedFile] = {}
        try:
            self._entries = _map_files(path, manifest, self.tensors, self._files)
        except BaseException:
            self.close()
            raise
        self._arrays = {name: self._view(tensor) for name, tensor in self.tensors.items()}
        self._verification = Verification(path, self._files, self._entries, manifest.tensors)
        self.unverified = False
        self._looked = -math.inf  # when it last looked at its files

    @classmethod
    def open(cls, path: Path, check: bool = False) -> Store:
        """Map a store. Raises `WeightsError` when it is not whole.

        Checksums of the tensors are verified for a store of at most `ALWAYS_VERIFIED` bytes, or when `check`
        is set, which also looks for values that are not finite. Those of others are not, which `unverified` says,
        unless their files are as old as when they were found right: `verify` or `verify_in_background` does it.
        """
        path = Path(path)
        store = cls(path, read_manifest(path))
        try:
            if check or store.nbytes <= ALWAYS_VERIFIED:
                store._verify(finite=check)
            else:
                store.unverified = store._verification.needed
        except BaseException:
            store.close()
            raise
        return store

    @property
    def content(self) -> str:
        """Identifies the weights: what they are of, in which formats, and the checksums of their bytes."""
        parts = [self._config, self.mix.to_dict(), self._checksums]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def verify(self, name: str) -> None:
        """Raise WeightsError if a tensor is damaged; reads it without touching what is mapped."""
        self._verification.verify([name])

    def verify_in_background(self) -> None:
        """Verify all tensors in a thread, once. What it finds, `require_sound` raises."""
        if self.unverified:
            self.unverified = False
            self._verification.start()

    def require_sound(self) -> None:
        """Raise WeightsError if a mapped file was cut or changed, or if verification has found damage.

        For before every step; short ones do not look at the files each time, which would take longer than they do. What
        a step reads of a file that was cut, `require_unharmed` finds after it.
        """
        if self._verification.problem:
            raise self._verification.problem
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = -math.inf  # until every file is found as it was
        for file in self._files.values():
            stamp = file.stamp_now()
            if stamp != file.stamp:
                self._require_unchanged(file, stamp)
        self._looked = now

    def require_unharmed(self) -> None:
        """Raise WeightsError if zeros were read in place of weights, because their file had been cut."""
        for file in self._files.values():
            if file.harmed:
                raise WeightsError(f"{file.path}: was cut while it was read: {_ADVICE}")

    def _require_unchanged(self, file: MappedFile, stamp: Stamp) -> None:
        """A file that was only touched, or written with the same content, is as good as before."""
        if stamp[0] < file.stamp[0]:
            raise WeightsError(f"{file.path}: was cut to {stamp[0]} bytes while it was in use: {_ADVICE}")
        try:
            self._verification.verify(self._verification.names_in(file.path.name))
        except (WeightsError, OSError) as error:
            raise WeightsError(f"{file.path}: was changed while it was in use ({error}): {_ADVICE}") from None
        file.stamp = stamp

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """A read-only view: packed bytes (uint8), or float32, in the shape that `layout` gives."""
        return self._arrays[name]

    def address(self, name: str, node: int = -1) -> int:
        """Where the tensor starts in memory, a multiple of 64; valid until `close`. It is whole: node must be -1."""
        assert node == -1, f"{name} is mapped, no node has a part of it"
        return int(self._arrays[name].ctypes.data)

    def close(self) -> None:
        """Unmap, as soon as no view of a tensor is in use any more."""
        if hasattr(self, "_verification"):
            self._verification.stop()
        for file in self._files.values():
            file.close()
        self._files.clear()
        if hasattr(self, "_arrays"):
            self._arrays.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _view(self, tensor: StoreTensor) -> npt.NDArray[np.generic]:
        entry = self._entries[tensor.name]
        whole = self._files[shard_file(tensor.shard)].bytes
        return whole[entry.start : entry.end].view(_DTYPES[tensor.dtype]).reshape(tensor.shape)

    def _verify(self, finite: bool) -> None:
        for name, array in self._arrays.items():
            if zlib.crc32(array.data) != self._checksums[name]:
                raise damaged(self.path, f"tensor {name} has a wrong checksum")
            if finite and not _all_finite(self.tensors[name], array):
                raise WeightsError(f"{self.path}: tensor {name} holds NaN or infinity: take another checkpoint")


def is_store(path: Path) -> bool:
    return is_file(path / MANIFEST)


def is_outdated(path: Path) -> bool:
    """Whether a store has other tensors than its model has now, because another version of the program packed it."""
    with suppress(WeightsError):  # opening it says why
        manifest = read_manifest(path)
        wanted = model_spec(manifest.config).store_tensors(manifest.mix)
        return set(manifest.tensors) != {tensor.name for tensor in wanted}
    return False


def shard_file(shard: str) -> str:
    return f"{shard}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """That of a whole store; raises `WeightsError` for anything else."""
    if is_store(path):
        return Manifest.read(path / MANIFEST)
    if is_file(path / UNFINISHED):
        raise WeightsError(f"{path}: packing it was not finished: run hybrid pack again to resume")
    raise WeightsError(f"{path}: is not a packed store, it has no {MANIFEST}: make one with hybrid pack")


def _map_files(
    path: Path, manifest: Manifest, tensors: dict[str, StoreTensor], files: dict[str, MappedFile]
) -> dict[str, Entry]:
    """Map all shards into `files`; where each tensor lies in them."""
    if set(manifest.tensors) != set(tensors):
        raise damaged(path, "the manifest lists other tensors than its model has")
    entries: dict[str, Entry] = {}
    for file in sorted({shard_file(tensor.shard) for tensor in tensors.values()}):
        files[file] = MappedFile(path / file, manifest.shards.get(file))
        entries.update(read_header(path / file))
    for tensor in tensors.values():
        _check_entry(path, tensor, entries.get(tensor.name))
    return {name: entries[name] for name in tensors}


def _all_finite(tensor: StoreTensor, array: npt.NDArray[np.generic]) -> bool:
    """Whether no stored value or scale is NaN or infinite."""
    if tensor.format is None:
        return all_finite(array)
    return all(
        FORMATS[format].all_finite(blocks, inputs)
        for blob in array.reshape(-1, tensor.shape[-1]).view(np.uint8)
        for format, inputs, blocks in _block_pieces(tensor, blob)
    )


def _block_pieces(tensor: StoreTensor, blob: Bytes) -> Iterator[tuple[str, int, Bytes]]:
    """The blocks of one matrix or expert, some MB at a time, with their format and number of inputs."""
    assert tensor.format is not None
    start = 0
    for run, format in zip(tensor.runs, matrix_formats(tensor.format), strict=False):
        size = FORMATS[format].block_bytes(run.inputs)
        blocks = blob[start : start + run.count * size].reshape(run.count, size)
        start += blocks.size
        step = max(1, _FINITE_BYTES // size)
        yield from ((format, run.inputs, blocks[first : first + step]) for first in range(0, run.count, step))


def _check_entry(path: Path, tensor: StoreTensor, entry: Entry | None) -> None:
    expected = (path / shard_file(tensor.shard), tensor.dtype, tensor.shape)
    if entry is None or (entry.path, entry.dtype, entry.shape) != expected or entry.start % ALIGNMENT:
        raise damaged(path / shard_file(tensor.shard), f"tensor {tensor.name} is missing or laid out otherwise")
