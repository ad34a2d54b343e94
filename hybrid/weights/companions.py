"""The small files beside the weights that a store has copies of, so that nothing else is needed to use it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hybrid.errors import ConfigError
from hybrid.files import atomic_file, input_file, is_file
from hybrid.files.gguf import is_gguf
from hybrid.text.convert import CONVERTED, convert_tokenizer, needs_conversion
from hybrid.text.gguf_texts import text_files
from hybrid.weights.shard import SHARD

# By name, because what else a checkpoint has or links to is nobody's business.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "tekken.json", "vocab.bpe", "sentencepiece.bpe.model", "tiktoken.model", "qwen.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


def copy_companions(source: Path, output: Path, notice: Callable[[str], None]) -> None:
    """Copy them with their permissions, unless the copy is already as old and long as the original.

    A link is followed within the checkpoint, or to a blob of the cache of the hub that it lies in. Where it leads
    elsewhere, `notice` is told that the file is not copied. Tokenizer files without a tokenizer.json are converted to
    one; where that fails, `notice` is told. What a GGUF file says of texts becomes files. Raises WeightsError and
    CapacityError.
    """
    if is_gguf(source):
        return _write_texts(source, output, notice)
    for original in _companions(source):
        copy = output / original.relative_to(source)
        if not _is_inside(original, source):
            notice(f"note: {original} is a link out of the checkpoint, so the store has no copy of it")
        elif not _same(original, copy):
            _copy(original, copy)
    if needs_conversion(source):
        _convert(source, output, notice)


def _convert(source: Path, output: Path, notice: Callable[[str], None]) -> None:
    """As old as the youngest of the files that it is made of."""
    target, time = output / CONVERTED, max(path.stat().st_mtime_ns for path in _companions(source))
    if is_file(target) and target.stat().st_mtime_ns == time:
        return
    try:
        converted = convert_tokenizer(source)
    except ConfigError as error:
        notice(f"note: the store has no {CONVERTED}: {error}")
        return
    with atomic_file(target) as file:
        file.write(converted)
    os.utime(target, ns=(time, time))


def _write_texts(source: Path, output: Path, notice: Callable[[str], None]) -> None:
    """As old as the GGUF file that they are made of."""
    time = source.stat().st_mtime_ns
    if is_file(output / CONVERTED) and (output / CONVERTED).stat().st_mtime_ns == time:
        return
    try:
        files = text_files(source)
    except ConfigError as error:
        notice(f"note: the store has no {CONVERTED}: {error}")
        return
    for name, content in reversed(files.items()):  # tokenizer.json last
        with atomic_file(output / name) as file:
            file.write(content)
        os.utime(output / name, ns=(time, time))


def _companions(source: Path) -> Iterator[Path]:
    return (source / name for name in COMPANIONS if is_file(source / name))


def _is_inside(original: Path, source: Path) -> bool:
    """In the cache of the hub, models--NAME/snapshots/REVISION/FILE is a link to models--NAME/blobs/HASH."""
    folder, target = source.resolve(), original.resolve()
    blobs = folder.parent.with_name("blobs")
    return target.is_relative_to(folder) or (folder.parent.name == "snapshots" and target.parent == blobs)


def _same(original: Path, copy: Path) -> bool:
    if not is_file(copy):
        return False
    one, other = original.stat(), copy.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _copy(original: Path, copy: Path) -> None:
    copy.parent.mkdir(exist_ok=True)
    with input_file(original, SHARD) as file:
        status = original.stat()
        with atomic_file(copy) as target:
            os.fchmod(target.fileno(), status.st_mode & 0o777)
            shutil.copyfileobj(file, target)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
