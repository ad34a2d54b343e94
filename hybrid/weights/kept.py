"""The stores that a cache keeps: what they are of, how large they are, when they were used last; and their removal."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid.errors import HybridError, WeightsError
from hybrid.files import disk_errors, is_file
from hybrid.weights.checkpoints.files import has_weights, may_read_weights
from hybrid.weights.companions import COMPANIONS
from hybrid.weights.manifest import MANIFEST, UNFINISHED, Manifest
from hybrid.weights.mapped import VERIFIED
from hybrid.weights.source import source_fingerprint, source_place

# Why a store is of no use to anybody; "" means that it is.
UNFINISHED_STORE, DAMAGED, OLDER, GONE, CHANGED = (
    "unfinished", "damaged", "of an older version", "source gone", "source changed",
)  # fmt: skip


@dataclass(frozen=True)
class KeptStore:
    """A store of a cache. used: seconds since 1970. source: folder of the checkpoint, "" if unknown. useless: why it is
    never opened again, "" if it may be.
    """

    path: Path
    nbytes: int
    used: float
    formats: str = ""
    source: str = ""
    useless: str = ""

    @property
    def name(self) -> str:
        return self.path.name


def kept_stores(cache_dir: Path) -> list[KeptStore]:
    """Those in a cache, the one used last first. Raises WeightsError."""
    if not cache_dir.exists():
        return []
    with disk_errors(cache_dir):
        folders = [place for place in cache_dir.iterdir() if place.is_dir() and not place.is_symlink()]
        found = [_describe(place) for place in folders if _is_store(place)]
    return sorted(found, key=lambda store: (-store.used, store.name))


def remove_store(store: KeptStore) -> None:
    """Remove the files of a store and its folder; programs that use it keep what they have mapped.

    Raises WeightsError if it is being packed, and if the folder has files that are not a store's, which are kept.
    """
    with disk_errors(store.path), _locked(store.path):
        for name in (MANIFEST, UNFINISHED):  # first: from here on it is no store
            (store.path / name).unlink(missing_ok=True)
        for path in _files(store.path):
            path.unlink(missing_ok=True)
        if left := sorted(path.name for path in store.path.iterdir()):
            raise WeightsError(f"{store.path}: is no store any more, but other files are kept: {', '.join(left)[:200]}")
        store.path.rmdir()


def note_use(store: Path, source: Path) -> None:
    """Remember when a store was used last, and where its checkpoint is if it was moved. A cache may be read-only."""
    with suppress(OSError, ValueError, HybridError):
        manifest = Manifest.read(store / MANIFEST)
        if not Path(manifest.origin).exists():
            moved = replace(manifest, origin=str(source.resolve()), place=source_place(source))
            moved.write(store / MANIFEST)
        os.utime(store / MANIFEST)


def _is_store(place: Path) -> bool:
    return is_file(place / MANIFEST) or is_file(place / UNFINISHED)


def _files(place: Path) -> list[Path]:
    """What packing, verifying and using write into a store."""
    names = [MANIFEST, UNFINISHED, VERIFIED, *COMPANIONS]
    shards = [*place.glob("outer.safetensors"), *place.glob("layer-*.safetensors"), *place.glob("*.tmp")]
    return [*(place / name for name in names if is_file(place / name)), *shards]


def _describe(place: Path) -> KeptStore:
    files = [path.stat() for path in _files(place)]
    times = [(place / name).stat().st_mtime for name in (MANIFEST, UNFINISHED) if is_file(place / name)]
    store = KeptStore(place, sum(status.st_blocks * 512 for status in files), max(times))
    if not is_file(place / MANIFEST):
        return replace(store, useless=UNFINISHED_STORE)
    try:
        manifest = Manifest.read(place / MANIFEST)
    except WeightsError as error:
        return replace(store, useless=OLDER if "layout version" in str(error) else DAMAGED)
    store = replace(store, formats=str(manifest.mix), source=manifest.origin)
    return replace(store, useless=_why_useless(manifest))


def _why_useless(manifest: Manifest) -> str:
    """A checkpoint that cannot be read just now is not gone."""
    source = Path(manifest.origin)
    if not manifest.origin:
        return OLDER
    try:
        if not has_weights(source):
            return GONE
        changed = may_read_weights(source) and source_fingerprint(source) != manifest.source
    except (OSError, ValueError, HybridError):
        return ""
    return CHANGED if changed else ""


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """The lock that packing holds."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise WeightsError(f"{place}: is being packed by another process; wait for it, or end it") from None
    finally:
        os.close(descriptor)
