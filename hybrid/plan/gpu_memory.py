"""What a device holds in its own memory, by part, and who gets what is left: pure, from numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.errors import ConfigError
from hybrid.formats.mix import FormatMix
from hybrid.machine.memory import size_text
from hybrid.models.spec import AttentionSpec, LayerSpec, ModelSpec
from hybrid.weights.layout import qkv_width, round_up, shares_head

KV_SHARE = 4  # the mirror gets a fourth of what weights and workspace leave if it can choose, slots the rest
KV_STEP = 64  # tokens
SCORES = 1 << 24  # of attention that are there at a time
SHAPES = 8  # of steps whose CUDA graphs are kept
_SCORE_COPIES = 4  # scaled, masked, weights, and those in bf16 with what is seen
_FLOW = 3  # times the residual stream: itself, its normed rows, and those of a shared expert
_BF16, _FP32 = 2, 4


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
        """For slots, as long as there are none; then what nobody uses."""
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


@dataclass(frozen=True)
class StepSizes:
    """The largest step: its rows, sequences, and tokens of a sequence."""

    rows: int
    sequences: int
    length: int


def plan_device(
    spec: ModelSpec, mix: FormatMix, free: int, sizes: StepSizes, kv_tokens: int | None, torch_device: str
) -> DeviceMemory:
    """free: bytes. kv_tokens: asked for, None: what fits.

    The mirror holds the rows of a step at least, and no more than a sequence. Raises ConfigError with the numbers if
    the device is too small.
    """
    weights, workspace = device_weight_bytes(spec, mix), workspace_bytes(spec, sizes)
    each = sizes.sequences * token_bytes(spec)
    least, most = round_up(sizes.rows, KV_STEP), round_up(sizes.length, KV_STEP)
    left = free - weights - workspace
    if kv_tokens is None:
        wanted = max(least, left // KV_SHARE // each // KV_STEP * KV_STEP)
    else:
        wanted = round_up(kv_tokens, KV_STEP)
    tokens = max(least, min(wanted, most))
    if tokens * each > left:
        raise ConfigError(
            f"the device has {size_text(free)} free; weights take {size_text(weights)}, a step {size_text(workspace)} "
            f"and {tokens} mirrored tokens of {sizes.sequences} sequences {size_text(tokens * each)}: "
            "lower --gpu-kv-tokens, --max-batch or --chunk-size, or use --device cpu"
        )
    return DeviceMemory(free, weights, workspace, tokens, tokens * each, torch_device=torch_device)


def device_weight_bytes(spec: ModelSpec, mix: FormatMix) -> int:
    """Of all but the experts: matrices in bf16; norms, biases and routers in fp32."""
    heads = 1 if shares_head(spec, mix) else 2
    outer = heads * spec.vocab * spec.hidden * _BF16 + spec.hidden * _FP32
    return outer + sum(_layer_weights(spec.hidden, layer) for layer in spec.layers)


def token_bytes(spec: ModelSpec) -> int:
    """Of one mirrored token: keys and values of all layers in bf16."""
    return sum(2 * layer.attention.kv_heads * layer.attention.head_dim * _BF16 for layer in spec.layers)


def workspace_bytes(spec: ModelSpec, sizes: StepSizes) -> int:
    """An upper bound of what a step has beside weights and mirror: intermediates of its largest layer, and logits; and
    what the graphs of steps that decode leave from layer to layer.
    """
    widest = max(_row_floats(spec.hidden, layer) for layer in spec.layers)
    keys = round_up(sizes.length, KV_STEP)
    scores = min(SCORES, max(sizes.rows * layer.attention.heads * keys for layer in spec.layers))
    kept = SHAPES * len(spec.layers) * _FLOW * sizes.sequences * spec.hidden
    return (sizes.rows * widest + _SCORE_COPIES * scores + 2 * sizes.sequences * spec.vocab + kept) * _FP32


def _layer_weights(hidden: int, layer: LayerSpec) -> int:
    attention, ffn = layer.attention, layer.feed_forward
    width, heads = qkv_width(layer), attention.heads * attention.head_dim
    intermediate = ffn.shared_intermediate if ffn.is_moe else ffn.intermediate
    matrices = (width + heads + 3 * intermediate) * hidden
    router = (ffn.experts + ffn.shared_gate) * (hidden + (ffn.router is not None and ffn.router.bias))
    floats = 2 * hidden + router * ffn.is_moe + _attention_floats(attention, width, hidden)
    return matrices * _BF16 + floats * _FP32


def _attention_floats(attention: AttentionSpec, width: int, hidden: int) -> int:
    norms = 2 * attention.head_dim * (attention.qk_norm == "head")
    return norms + width * attention.qkv_bias + hidden * attention.out_bias + attention.heads * attention.sinks


def _row_floats(hidden: int, layer: LayerSpec) -> int:
    """fp32 words of one row: its stream and what is normed, projections before and after rope, feed-forward, router."""
    attention, ffn = layer.attention, layer.feed_forward
    intermediate = ffn.shared_intermediate if ffn.is_moe else ffn.intermediate
    attended = attention.heads * attention.head_dim
    return 5 * hidden + 3 * qkv_width(layer) + 2 * attended + 4 * intermediate + 2 * ffn.experts
