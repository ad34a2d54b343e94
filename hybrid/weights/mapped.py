"""Files of a store in memory: mapped, watched for changes in place, and verified in the background."""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

import cpu_kernels
from hybrid.errors import HybridError, WeightsError
from hybrid.files import input_descriptor, is_file, read_json_object, write_json
from hybrid.formats.block import Bytes
from hybrid.weights.shard import SHARD, Entry

VERIFIED = "verified.json"  # of a store: the sizes and times that its files had when their checksums were right
_PIECE = 8 << 20  # read and summed without Python's lock
_NICE = 19  # of the thread that verifies

Stamp = tuple[int, int]  # size and time of change


class MappedFile:
    """One file, mapped read-only. It stays what it is if its name is given to another or removed, but whoever cuts it
    or writes into it changes what is mapped. Pages that were cut off read as zeros, and `harmed` says so.
    """

    def __init__(self, path: Path, size: int | None) -> None:
        """size: what it must be. Raises WeightsError."""
        if not is_file(path):
            raise damaged(path, "cannot be read (No such file or directory)")
        with input_descriptor(path, SHARD) as opened:
            self.path, self._descriptor = path, os.dup(opened)
        self.stamp = self.stamp_now()
        self._range: cpu_kernels.MappedRange | None = None
        try:
            if self.stamp[0] != size:
                raise damaged(path, f"has {self.stamp[0]} bytes, the manifest says {size}")
            self.bytes: Bytes = np.frombuffer(mmap.mmap(self._descriptor, size, prot=mmap.PROT_READ), np.uint8)
            self._range = cpu_kernels.MappedRange(self.bytes.ctypes.data, size)
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: it is empty
            self.close()
            raise damaged(path, f"cannot be mapped ({error})") from None
        except BaseException:
            self.close()
            raise

    @property
    def harmed(self) -> bool:
        """Whether zeros were read in place of a page that the file no longer had."""
        return bool(self._range and self._range.damaged)

    def stamp_now(self) -> Stamp:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def checksum(self, entry: Entry, stopped: Callable[[], bool] = lambda: False) -> int | None:
        """crc32 of a tensor, by reading: what is mapped must not be touched if the file may have been cut. None if it
        was stopped.
        """
        crc = 0
        for start in range(entry.start, entry.end, _PIECE):
            if stopped():
                return None
            crc = zlib.crc32(os.pread(self._descriptor, min(_PIECE, entry.end - start), start), crc)
        return crc

    def close(self) -> None:
        """What is mapped stays until no view of it is in use."""
        self._range = None
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Verification:
    """The checksums of the tensors of mapped files, verified by a thread of the lowest priority."""

    def __init__(
        self, store: Path, files: Mapping[str, MappedFile], entries: Mapping[str, Entry], crcs: Mapping[str, int]
    ):
        self._store, self._files, self._entries, self._crcs = store, files, entries, crcs
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.problem: WeightsError | None = None

    @property
    def needed(self) -> bool:
        """Whether the files are not those whose checksums were found right before."""
        with suppress(HybridError):
            return read_json_object(self._store / VERIFIED) != self._record()
        return True

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="hybrid-verify", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all is verified, or `stop`."""
        if self._thread:
            self._thread.join()

    def stop(self) -> None:
        """Ends the thread; a forked process has none."""
        self._stop.set()
        if self._thread and self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def verify(self, names: Iterable[str]) -> None:
        """Raise WeightsError for the first of these tensors that is damaged."""
        for name in names:
            entry = self._entries[name]
            found = self._files[entry.path.name].checksum(entry, self._stop.is_set)
            if found is not None and found != self._crcs[name]:
                raise damaged(self._store, f"tensor {name} has a wrong checksum")

    def names_in(self, file: str) -> list[str]:
        return [name for name, entry in self._entries.items() if entry.path.name == file and name in self._crcs]

    def _run(self) -> None:
        with suppress(OSError):  # Not SCHED_IDLE: on a busy machine it would hold Python's lock and not run.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        before = self._record()
        try:
            self.verify(self._crcs)
        except WeightsError as error:
            self.problem = error
            return
        except OSError as error:
            self.problem = damaged(self._store, f"cannot be read ({error.strerror})")
            return
        if not self._stop.is_set() and before == self._record():
            with suppress(HybridError, OSError):  # a store that is read-only is verified at every start
                write_json(self._store / VERIFIED, before)

    def _record(self) -> dict[str, object]:
        """As JSON has it. What the checksums are is part of it."""
        stamps = {name: list(file.stamp_now()) for name, file in self._files.items()}
        return {"files": stamps, "checksums": zlib.crc32(repr(sorted(self._crcs.items())).encode())}


def damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path}: {what}: pack the model again with hybrid pack")
