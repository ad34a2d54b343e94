"""Files that are read within bounds, and files that are written whole or not at all."""

from hybrid.files.json import MODEL_FILE, parse_json, read_json_object, write_json
from hybrid.files.locking import FolderLock
from hybrid.files.places import is_file, is_stream
from hybrid.files.reading import Reading, input_descriptor, input_file, read_file
from hybrid.files.writing import (
    FileKind,
    NewFile,
    atomic_file,
    check_output,
    csv_kind,
    disk_errors,
    open_output,
    output_file,
)

__all__ = [
    "MODEL_FILE",
    "FileKind",
    "FolderLock",
    "NewFile",
    "Reading",
    "atomic_file",
    "check_output",
    "csv_kind",
    "disk_errors",
    "input_descriptor",
    "input_file",
    "is_file",
    "is_stream",
    "open_output",
    "output_file",
    "parse_json",
    "read_file",
    "read_json_object",
    "write_json",
]
