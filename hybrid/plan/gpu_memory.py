"""What a device holds in its own memory, by part, and who gets what is left: pure, from numbers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid.errors import ConfigError
from hybrid.formats.block import round_up
from hybrid.formats.mix import FormatMix
from hybrid.machine.memory import size_text
from hybrid.models.layers.base import DeviceNeeds, Extents
from hybrid.models.layers.products import BF16, FP32
from hybrid.models.spec import ModelSpec

KV_SHARE = 4  # the mirror gets a fourth of what weights and workspace leave if it can choose, slots the rest
KV_STEP = 64  # tokens
SCORES = 1 << 24  # of attention that are there at a time
SHAPES = 8  # of steps whose CUDA graphs are kept
_SCORE_COPIES = 4  # scaled, masked, weights, and those in bf16 with what is seen
_FLOW = 3  # times the residual stream: itself, its normed rows, and those of a shared expert


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes by part. free: what the device had before. kv_tokens: mirrored of every sequence. slots: of the cache.

    torch_device: "cuda", or "cpu" where the memory of the host stands in for it.
    """

    free: int
    weights: int
    workspace: int
    kv_tokens: int
    kv: int
    slots: int = 0
    torch_device: str = "cuda"

    @property
    def used(self) -> int:
        return self.weights + self.workspace + self.kv + self.slots

    @property
    def left(self) -> int:
        """Room for slots before they are planned; afterwards unused bytes."""
        return self.free - self.used

    @property
    def stand_in_bytes(self) -> int:
        """What the host must have for it; its slots are counted elsewhere."""
        return self.weights + self.workspace + self.kv if self.torch_device == "cpu" else 0

    def rows(self) -> list[tuple[str, int]]:
        """What `--dry-run` shows: names and bytes."""
        return [
            ("weights but those of experts, in bf16", self.weights),
            ("workspace of a step, at most", self.workspace),
            (f"mirrored keys and values, {self.kv_tokens} tokens a sequence", self.kv),
            ("slots of experts", self.slots),
            ("left", self.left),
            ("free before", self.free),
        ]


def plan_device(
    spec: ModelSpec, mix: FormatMix, free: int, extents: Extents, kv_tokens: int | None, torch_device: str
) -> DeviceMemory:
    """free: bytes. kv_tokens: mirrored tokens of each sequence as configured; None: what fits.

    The mirror holds at least the rows of a step and at most one full sequence. Raises ConfigError with the numbers if
    the device is too small.
    """
    weights, workspace = device_weight_bytes(spec, mix), workspace_bytes(spec, mix, extents)
    each = extents.sequences * token_bytes(spec, mix)
    min_tokens, max_tokens = round_up(extents.rows, KV_STEP), round_up(extents.tokens, KV_STEP)
    left = free - weights - workspace
    if kv_tokens is None:
        wanted = max(min_tokens, left // KV_SHARE // max(1, each) // KV_STEP * KV_STEP)
    else:
        wanted = round_up(kv_tokens, KV_STEP)
    tokens = max(min_tokens, min(wanted, max_tokens))
    if tokens * each > left:
        raise ConfigError(
            f"the device has {size_text(free)} free; weights take {size_text(weights)}, a step {size_text(workspace)} "
            f"and {tokens} mirrored tokens of {extents.sequences} sequences {size_text(tokens * each)}: "
            "lower --gpu-kv-tokens, --max-batch or --chunk-size, or use --device cpu"
        )
    return DeviceMemory(free, weights, workspace, tokens, tokens * each, torch_device=torch_device)


def device_weight_bytes(spec: ModelSpec, mix: FormatMix) -> int:
    """Bytes of all weights but the experts: matrices in bf16; norms, biases and routers in fp32."""
    heads = 1 if spec.shares_head(mix) else 2
    outer = heads * spec.vocab * spec.hidden * BF16 + _outer_floats(spec) * FP32
    return outer + sum(needs.weights for needs in _needs(spec, mix))


def _outer_floats(spec: ModelSpec) -> int:
    """Of the final norm and the bias of the head."""
    return spec.hidden * (2 if spec.norm == "layer" else 1) + spec.vocab * spec.head_bias


def token_bytes(spec: ModelSpec, mix: FormatMix) -> int:
    """Bytes of one mirrored token, over all layers."""
    return sum(needs.token for needs in _needs(spec, mix))


def workspace_bytes(spec: ModelSpec, mix: FormatMix, extents: Extents) -> int:
    """An upper bound of the bytes of a step beside weights and mirror: intermediates of its largest layer, logits, and
    the outputs of layers that the CUDA graphs of decode steps keep.
    """
    needs = list(_needs(spec, mix))
    both = zip(needs[::2], needs[1::2], strict=True)  # halves of a layer
    widest = 5 * spec.hidden + max(mixer.row_floats + feed_forward.row_floats for mixer, feed_forward in both)
    keys = round_up(extents.tokens, KV_STEP)
    scores = min(SCORES, extents.rows * keys * max(half.scores for half in needs))
    kept = SHAPES * len(spec.layers) * _FLOW * extents.sequences * spec.hidden
    rows, logits = extents.rows * widest, 2 * extents.sequences * spec.vocab
    return (rows + _SCORE_COPIES * scores + logits + kept) * FP32


def _needs(spec: ModelSpec, mix: FormatMix) -> Iterator[DeviceNeeds]:
    """Needs of every half, in order. Raises ConfigError for a kind that no device computes."""
    for place, half in spec.halves(mix):
        needs = half.device_needs(place)
        if needs is None:
            mixer = spec.layers[place.layer].mixer
            shorter = half is mixer and spec.within(1).layers[place.layer].mixer.device_needs(place) is not None
            raise ConfigError(
                f"layer {place.layer} of model_type {spec.model_type!r} is of a kind that no device computes "
                f"({type(half).__name__}); use --step-on threads"
                + (", or a shorter --max-seq-len (docs/models.md)" if shorter else "")
            )
        yield needs
    if spec.streams:
        raise ConfigError(
            f"the residual stream of model_type {spec.model_type!r} is several streams, which no device computes; use "
            "--step-on threads"
        )
