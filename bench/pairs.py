"""The models of a comparison: a synthetic checkpoint, the first layers of one, and how many fit in memory twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import Progress
from synthetic_checkpoint import CONFIGS, make_config, write_checkpoint

from hybrid.commands.console import say
from hybrid.commands.measure import Test
from hybrid.errors import CapacityError, ConfigError
from hybrid.files import write_json
from hybrid.machine.rates import PROBE_BYTES
from hybrid.models import model_spec
from hybrid.weights.checkpoints.files import read_config
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.source import source_fingerprint

# Models that are compared as a GGUF file of their own types, and what is changed of them. Of DeepSeek-V2-Lite llama.cpp
# reads 27 layers or none; experts that are left out are none that a token reads.
GGUF_SLICES: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {"num_hidden_layers": 8},
    "deepseek-v2-lite": {"num_hidden_layers": 27, "n_routed_experts": 32},
}
WHOLE = ("deepseek-v2-lite",)  # cannot have fewer layers
BUFFERS = 1_200_000_000  # both engines' steps and logits, llama.cpp's spare block, Python
F16_BYTES = 2


def synthetic(like: str, layers: int, folder: Path) -> Path:
    """A checkpoint with the layer shapes of a published model in `folder`, written unless it is there."""
    if like not in CONFIGS:
        raise ConfigError(f"--like {like!r} is unknown; known: {', '.join(CONFIGS)}")
    path, config = folder / f"{like}-{layers}-layers", make_config(like, layers=layers)
    if not (path / "config.json").is_file():
        size = 2e-9 * sum(int(np.prod(shape)) for _, shape in model_spec(config).checkpoint_shapes())
        say(
            f"note: writing a checkpoint of {size:.1f} GB to {path}; bf16 takes {2 * size:.1f} GB more there, "
            f"int8 {1.06 * size:.1f}, int4 {0.56 * size:.1f}; it is used again, delete it when you are done"
        )
        write_checkpoint(path, config, seed=0)
    return path


def synthetic_file(like: str, layers: int | None, folder: Path, progress: Progress | None = None) -> Path:
    """A GGUF file with the shapes and types of a published one of `GGUF_SLICES`, written unless it is there.

    Raises ConfigError for a number of layers that llama.cpp does not read, CapacityError for a full disk.
    """
    config = {**CONFIGS[like], **GGUF_SLICES[like]}
    if layers and like in WHOLE and layers != config["num_hidden_layers"]:
        raise ConfigError(f"--layers {layers}: llama.cpp reads {like} with {config['num_hidden_layers']} or not at all")
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    path = folder / f"{like}-{config['num_hidden_layers']}-layers.gguf"
    if not path.is_file():
        from synthetic_gguf import write_synthetic

        write_synthetic(path, config, progress)
        say(f"note: wrote {path.stat().st_size / 1e9:.1f} GB to {path}; it is used again, delete it when you are done")
    return path


def first_layers(path: Path, layers: int, folder: Path) -> Path:
    """A checkpoint in `folder` that is the first layers of another: its own config.json, links to the weights."""
    config = read_config(path)
    have = config["num_hidden_layers"]
    if layers > have:
        raise ConfigError(f"--layers {layers} is more than the {have} of {path}")
    if layers == have:
        return path
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    view = folder / f"{path.name}-first-{layers}-{source_fingerprint(path)[:8]}"
    view.mkdir(parents=True, exist_ok=True)
    for file in path.glob("*"):
        if file.name != "config.json" and not (view / file.name).exists():
            (view / file.name).symlink_to(file.resolve())
    write_json(view / "config.json", config)
    return view


def layers_that_fit(checkpoint: Checkpoint, type_name: str, tests: Sequence[Test], free: int) -> int:
    """How many layers can be in memory twice, ours and theirs, with the KV of the tests and the probe's memory.

    Ours counts as theirs: the formats that meet are as large. The embedding is left out, a step reads a few rows of it.
    """
    from gguf_file import file_tensors

    sizes = {tensor.name: tensor.nbytes for tensor in file_tensors(checkpoint, type_name)}
    layers = len(checkpoint.spec.layers)
    a_layer = sum(size for name, size in sizes.items() if name.startswith("blk.")) // layers
    head = sizes.get("output.weight", sizes["token_embd.weight"])
    fixed = PROBE_BYTES + BUFFERS + 2 * head
    each = 2 * a_layer + _kv_bytes(checkpoint, tests)
    fit = (free - fixed) // each
    if fit < 1:
        raise CapacityError(
            f"one layer twice takes {(fixed + each) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: free some memory, or "
            "leave out the deepest of --tests"
        )
    return min(layers, fit)


def _kv_bytes(checkpoint: Checkpoint, tests: Sequence[Test]) -> int:
    """Keys and values of a layer in both engines, and llama.cpp's saved state of every depth."""
    attention = checkpoint.spec.layers[0].mixer
    token = 2 * attention.kv_heads * attention.head_dim * F16_BYTES
    alone = max((test.length for test in tests if test.batch == 1), default=0)
    together = max((test.batch * test.length for test in tests if test.batch > 1), default=0)
    saved = sum({test.depth for test in tests})
    return token * (2 * (alone + together) + saved)
