"""What the kernels can run of all that a ModelSpec can say."""

from __future__ import annotations

from hybrid.errors import ConfigError
from hybrid.models.spec import ModelSpec


def check_supported(spec: ModelSpec) -> None:
    """Raise ConfigError naming the first part of the model that no kernel implements."""
    for layer in spec.layers:
        attention, ffn = layer.attention, layer.feed_forward
        checks = {
            f"attention of kind {attention.kind!r}": attention.kind == "gqa" and attention.mla is None,
            "values of another size than keys": attention.v_head_dim in (None, attention.head_dim),
            f"norm {attention.qk_norm!r} on queries and keys": attention.qk_norm in ("none", "head"),
            "gated attention": not attention.output_gate,
            f"activation {ffn.activation!r}": ffn.activation in ("silu", "swiglu_clamped"),
            f"norm of kind {spec.norm.kind!r}": spec.norm.kind == "rms" and not spec.norm.zero_centred,
            "a bias on the output head": not spec.head_bias,
        }
        if router := ffn.router:
            known = router.kind in ("softmax", "topk_softmax") and not router.correction_bias and router.groups == 1
            checks[f"router of kind {router.kind!r}"] = known
            checks[f"a bias on a router of kind {router.kind!r}"] = not router.bias or router.kind == "topk_softmax"
        for what, supported in checks.items():
            if not supported:
                raise ConfigError(f"model_type {spec.model_type!r} uses {what}, which this version cannot run")
