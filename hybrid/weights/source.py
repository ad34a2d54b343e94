"""What identifies a checkpoint: its content, as far as that can be read at every start."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from hybrid.files import MODEL_FILE, input_descriptor, read_file
from hybrid.files.gguf import is_gguf, read_gguf_header
from hybrid.weights.checkpoints.files import config_files, weight_files
from hybrid.weights.shard import SHARD, header_end

READ_WHOLE = 64 << 20  # bytes of all weights; up to here they are read to the last, in less than a tenth of a second
SAMPLES, SAMPLE_BYTES = 4096, 4096  # of larger ones, over all files
_CHUNK = 1 << 20


def source_fingerprint(path: Path) -> str:
    """Differs between any two checkpoints that are not the same, wherever they lie and whatever their folders' names.

    It is made of config.json, the index and, of every file of weights, its name, the name of the file that a link
    leads to (in the cache of the hub that is a hash of the content), size, time of change, header and content: all
    of it in a small checkpoint, pages spread over the whole in a large one. So copies that keep their times, moves
    and links are the same checkpoint. Folders of one name and with the same sizes and times are not, nor is a
    checkpoint that was changed in place. Raises WeightsError.
    """
    digest = hashlib.sha256()
    weights = weight_files(path)
    total = sum(file.stat().st_size for file in weights)
    for file in config_files(path):
        digest.update(_name(file) + read_file(file, MODEL_FILE))
    for file in weights:
        with input_descriptor(file, SHARD) as opened:
            status = os.fstat(opened)
            digest.update(_name(file, f"{status.st_size} {status.st_mtime_ns}".encode()))
            whole = total <= READ_WHOLE
            for start, end in _everything(status.st_size) if whole else _samples(file, opened, status.st_size, total):
                digest.update(os.pread(opened, end - start, start))
    return digest.hexdigest()


def source_place(path: Path) -> str:
    """Identifies a checkpoint by where its files lie and when they last changed in any way, without reading weights.

    For those who may not read the weights of a model, only the store that somebody else has packed. It is no
    substitute for the above: a copy, a restart of a container or a change of owner gives another place.
    """
    digest = hashlib.sha256()
    for file in config_files(path)[:1]:
        digest.update(read_file(file, MODEL_FILE))
    for file in weight_files(path):
        status, target = file.stat(), os.fsencode(file.resolve())
        digest.update(b"%s\0%d %d %d\0" % (target, status.st_ino, status.st_size, status.st_ctime_ns))
    return digest.hexdigest()


def _name(file: Path, details: bytes = b"") -> bytes:
    return b"\0%s\0%s\0%s\0" % (os.fsencode(file.name), os.fsencode(file.resolve().name), details)


def _everything(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)]


def _samples(file: Path, descriptor: int, size: int, total: int) -> list[tuple[int, int]]:
    """The header of a file and pages of its data, which the system is told of so that it reads many at once.

    They lie apart by chance: with equal distances the same rows of each layer might be looked at.
    """
    first = read_gguf_header(file).end if is_gguf(file) else header_end(os.pread(descriptor, 8, 0), size)
    chance, count = random.Random(size), max(1, SAMPLES * size // total)
    step = (size - first) / count
    places = [first + int((index + chance.random()) * step) for index in range(count)]
    pages = [(place, min(place + SAMPLE_BYTES, size)) for place in places]
    for start, end in pages:
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
    return [*_everything(first), *pages]
