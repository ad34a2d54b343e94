"""Layers of Mamba-2, as configurations of Granite 4 and Bamba describe them."""

from __future__ import annotations

from dataclasses import replace

import cpu_kernels
from hybrid.errors import ConfigError
from hybrid.models.layers.mamba2 import LARGEST_STEP, Mamba2
from hybrid.models.reading import Fields

MAMBA, ATTENDS = ("mamba", "linear_attention"), ("attention", "full_attention")  # words of `layer_types`


def read_mamba(fields: Fields, *, eps: float) -> Mamba2:
    """Its sizes have names that begin with `mamba_`. eps: of its norm of groups."""
    fields.refuse("mamba_proj_bias", neutral=False)
    inner = fields.size("mamba_expand", default=2) * fields.size("hidden_size")
    heads = fields.size("mamba_n_heads", default=128, maximum=inner)
    mamba = Mamba2(
        heads,
        head_dim=inner // heads,
        groups=fields.size("mamba_n_groups", default=1),
        state_dim=fields.size("mamba_d_state", default=256, maximum=cpu_kernels.MAX_DELTA_DIM),
        taps=fields.size("mamba_d_conv", default=4, minimum=2, maximum=8),  # of what the kernel holds in registers
        conv_bias=fields.flag("mamba_conv_bias", default=True),
        eps=eps,
    )
    even = mamba.head_dim
    said = even if fields.says("mamba_d_head", "auto") else fields.size("mamba_d_head", default=even)
    if heads * said != inner:
        raise ConfigError(
            f"config.json: mamba_n_heads {heads} of mamba_d_head {said} are not mamba_expand times hidden_size, "
            f"{inner}: correct one of them"
        )
    return with_limits(fields, mamba)


def with_limits(fields: Fields, mamba: Mamba2) -> Mamba2:
    """The same with the limits of its steps. Raises ConfigError where its sizes do not fit."""
    if mamba.heads % mamba.groups:
        raise ConfigError(
            f"config.json: {mamba.heads} heads of Mamba-2 in {mamba.groups} groups are not as many in each: "
            "correct one of them"
        )
    if mamba.head_dim > cpu_kernels.MAX_DELTA_DIM:
        raise ConfigError(
            f"config.json: a head of Mamba-2 has {mamba.head_dim} dimensions; at most {cpu_kernels.MAX_DELTA_DIM} are "
            "supported: take another model"
        )
    smallest, largest = fields.interval("time_step_limit", default=(0.0, LARGEST_STEP))
    return replace(mamba, limits=(smallest, min(largest, LARGEST_STEP)))
