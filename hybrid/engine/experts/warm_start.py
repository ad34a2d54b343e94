"""Files that list the experts of a cache, so that the next run begins with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import ConfigError
from hybrid.files import FileKind, Reading, output_file, read_json_object
from hybrid.plan.expert_shape import ExpertShape

KIND = "hybrid-experts"
WARM = Reading(64 << 20, "write one with --cache-save", prefix="--cache-warm")
WARM_KIND = FileKind(
    "a list of experts", lambda head: KIND.encode() in head or head.startswith(b'{\n "experts": [')
)  # the second as older versions began


def model_mark(shape: ExpertShape, routers: Iterable[npt.NDArray[np.float32]]) -> str:
    """What tells one model from another, whatever its formats: a hash of the routers of its MoE layers."""
    digest = hashlib.sha256(f"{shape.experts} {shape.top_k}".encode())
    for router in routers:
        digest.update(router.tobytes())
    return digest.hexdigest()[:32]


def write_warm(path: Path, mark: str, shape: ExpertShape, keys: Iterable[int]) -> None:
    """keys: of the experts, as [layer, expert] in the file."""
    experts = [list(divmod(key, shape.experts)) for key in keys]
    with output_file(path, WARM_KIND) as file:
        file.write(json.dumps({"kind": KIND, "model": mark, "experts": experts}, indent=1).encode())


def read_warm(path: Path, mark: str, shape: ExpertShape) -> list[int]:
    """Keys in the order of the file. Raises ConfigError for another kind of file, or one of another model."""
    body = read_json_object(path, WARM)
    if body.get("kind") != KIND or not isinstance(body.get("experts"), list):
        raise ConfigError(f"--cache-warm {path} is no list of experts; write one with --cache-save")
    if body.get("model") != mark:
        raise ConfigError(f"--cache-warm {path} is of another model; write one of this model with --cache-save")
    return [_key(path, pair, shape) for pair in body["experts"]]


def _key(path: Path, pair: Any, shape: ExpertShape) -> int:
    numbers = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
    if not numbers or not (0 <= pair[0] < len(shape.layers) and 0 <= pair[1] < shape.experts):
        raise ConfigError(
            f"--cache-warm {path} lists {pair!r:.60}, which is no [layer, expert] of {len(shape.layers)} layers of "
            f"{shape.experts} experts; write it again with --cache-save"
        )
    return int(pair[0]) * shape.experts + int(pair[1])
