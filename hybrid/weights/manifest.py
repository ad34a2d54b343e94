"""manifest.json of a packed store. Written last, it is what makes a directory a store."""

from __future__ import annotations

import json
import reprlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from hybrid.errors import ConfigError, WeightsError
from hybrid.files import read_json_object, write_json
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import LAYOUT_VERSION

MANIFEST = "manifest.json"
UNFINISHED = "packing.json"  # the manifest of the shards done so far, while a store is being packed
KIND = "hybrid-store"


@dataclass(frozen=True)
class Manifest:
    """What a store says of itself.

    mix: the format of each part. config: contents of the model's config.json. source, place: of the checkpoint, by
    `hybrid.weights.source`. origin: its folder. shards: bytes by file name. tensors: crc32 of the stored bytes by
    tensor name.
    """

    mix: FormatMix
    config: dict[str, Any]
    source: str
    shards: dict[str, int]
    tensors: dict[str, int]
    place: str = ""
    origin: str = ""

    def write(self, path: Path) -> None:
        body = {"kind": KIND, "layout_version": LAYOUT_VERSION, **vars(self), "mix": self.mix.to_dict()}
        write_json(path, {**body, "checksum": _checksum(body)})

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raise `WeightsError` unless this is a whole manifest of this layout version and a known format."""
        body = read_json_object(path)
        checksum, version = body.pop("checksum", None), body.get("layout_version")
        if body.get("kind") != KIND:
            raise WeightsError(f"{path}: is not the manifest of a packed store; its kind must be {KIND!r}")
        if version != LAYOUT_VERSION:
            raise WeightsError(
                f"{path}: the store has layout version {reprlib.repr(version)}, this program reads {LAYOUT_VERSION}: "
                "pack the model again with hybrid pack"
            )
        if checksum != _checksum(body):
            raise WeightsError(f"{path}: its checksum is wrong, so it was changed or damaged: pack the model again")
        config: Any
        config, shards, tensors = (body.get(name) for name in ("config", "shards", "tensors"))
        texts = [body.get(name, "") for name in ("source", "place", "origin")]
        wrong = not isinstance(config, dict) or not all(isinstance(text, str) for text in texts)
        if wrong or not _counts(shards) or not _counts(tensors):
            raise WeightsError(f"{path}: its fields are not those of a packed store: pack the model again")
        source, place, origin = texts
        return cls(_read_mix(path, body.get("mix")), config, source, shards, tensors, place, origin)


def _counts(value: Any) -> TypeGuard[dict[str, int]]:
    return isinstance(value, dict) and all(type(count) is int and count >= 0 for count in value.values())


def _read_mix(path: Path, value: Any) -> FormatMix:
    try:
        layers = tuple(FormatMix(**mix) for mix in value.pop("layers", ()))
        return FormatMix(**value, layers=layers)
    except (TypeError, AttributeError, ConfigError) as error:
        raise WeightsError(
            f"{path}: the store has formats {reprlib.repr(value)} ({str(error)[:200]}): pack the model again with "
            "hybrid pack"
        ) from None


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
