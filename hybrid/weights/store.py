"""The packed store: a directory of aligned safetensors shards under a manifest, mapped into memory."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from hybrid.errors import WeightsError
from hybrid.files import input_descriptor, is_file
from hybrid.formats import FORMATS
from hybrid.formats.block import Bytes, all_finite
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import StoreTensor
from hybrid.weights.manifest import MANIFEST, UNFINISHED, Manifest
from hybrid.weights.shard import ALIGNMENT, SHARD, Entry, read_header

ALWAYS_VERIFIED = 1 << 30  # bytes: up to here verifying costs less than a second

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
        self._checksums = manifest.tensors
        self._arrays = _map_tensors(path, manifest, self.tensors)

    @classmethod
    def open(cls, path: Path, check: bool = False) -> Store:
        """Map a store. Raises `WeightsError` when it is not whole.

        Checksums of the tensors are verified for a store of at most `ALWAYS_VERIFIED` bytes, or when `check`
        is set, which also looks for values that are not finite.
        """
        path = Path(path)
        store = cls(path, read_manifest(path))
        if check or store.nbytes <= ALWAYS_VERIFIED:
            store._verify(finite=check)
        return store

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """A read-only view: packed bytes (uint8), or float32, in the shape that `layout` gives."""
        return self._arrays[name]

    def address(self, name: str, node: int = -1) -> int:
        """Where the tensor starts in memory, a multiple of 64; valid until `close`. It is whole: node must be -1."""
        assert node == -1, f"{name} is mapped, no node has a part of it"
        return int(self._arrays[name].ctypes.data)

    def close(self) -> None:
        """Unmap, as soon as no view of a tensor is in use any more."""
        self._arrays.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _verify(self, finite: bool) -> None:
        for name, array in self._arrays.items():
            if zlib.crc32(array.data) != self._checksums[name]:
                raise _damaged(self.path, f"tensor {name} has a wrong checksum")
            if finite and not _all_finite(self.tensors[name], array):
                raise WeightsError(f"{self.path}: tensor {name} holds NaN or infinity: take another checkpoint")


def is_store(path: Path) -> bool:
    return is_file(path / MANIFEST)


def shard_file(shard: str) -> str:
    return f"{shard}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """That of a whole store; raises `WeightsError` for anything else."""
    if is_store(path):
        return Manifest.read(path / MANIFEST)
    if is_file(path / UNFINISHED):
        raise WeightsError(f"{path}: packing it was not finished: run hybrid pack again to resume")
    raise WeightsError(f"{path}: is not a packed store, it has no {MANIFEST}: make one with hybrid pack")


def _map_tensors(path: Path, manifest: Manifest, tensors: dict[str, StoreTensor]) -> dict[str, npt.NDArray[np.generic]]:
    if set(manifest.tensors) != set(tensors):
        raise _damaged(path, "the manifest lists other tensors than its model has")
    entries: dict[str, Entry] = {}
    buffers: dict[str, npt.NDArray[np.uint8]] = {}
    for file in sorted({shard_file(tensor.shard) for tensor in tensors.values()}):
        buffers[file] = _map_file(path / file, manifest.shards.get(file))
        entries.update(read_header(path / file))
    for tensor in tensors.values():
        _check_entry(path, tensor, entries.get(tensor.name))
    return {
        name: buffers[shard_file(tensor.shard)][entries[name].start : entries[name].end]
        .view(_DTYPES[tensor.dtype])
        .reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def _all_finite(tensor: StoreTensor, array: npt.NDArray[np.generic]) -> bool:
    """Whether no stored value or scale is NaN or infinite."""
    if tensor.format is None:
        return all_finite(array)
    return all(
        FORMATS[tensor.format].all_finite(blocks, inputs)
        for blob in array.reshape(-1, tensor.shape[-1]).view(np.uint8)
        for inputs, blocks in _block_pieces(tensor, blob)
    )


def _block_pieces(tensor: StoreTensor, blob: Bytes) -> Iterator[tuple[int, Bytes]]:
    """The blocks of one matrix or expert, some MB at a time, with their number of inputs."""
    assert tensor.format is not None
    start = 0
    for run in tensor.runs:
        size = FORMATS[tensor.format].block_bytes(run.inputs)
        blocks = blob[start : start + run.count * size].reshape(run.count, size)
        start += blocks.size
        step = max(1, _FINITE_BYTES // size)
        yield from ((run.inputs, blocks[first : first + step]) for first in range(0, run.count, step))


def _map_file(path: Path, size: int | None) -> npt.NDArray[np.uint8]:
    if not is_file(path):
        raise _damaged(path, "cannot be read (No such file or directory)")
    with input_descriptor(path, SHARD) as file:
        found = os.fstat(file).st_size
        if found != size:
            raise _damaged(path, f"has {found} bytes, the manifest says {size}")
        try:
            return np.frombuffer(mmap.mmap(file, found, prot=mmap.PROT_READ), np.uint8)
        except (OSError, ValueError) as error:  # of an empty file
            raise _damaged(path, f"cannot be mapped ({error})") from None


def _check_entry(path: Path, tensor: StoreTensor, entry: Entry | None) -> None:
    expected = (path / shard_file(tensor.shard), tensor.dtype, tensor.shape)
    if entry is None or (entry.path, entry.dtype, entry.shape) != expected or entry.start % ALIGNMENT:
        raise _damaged(path / shard_file(tensor.shard), f"tensor {tensor.name} is missing or laid out otherwise")


def _damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path}: {what}: pack the model again with hybrid pack")
