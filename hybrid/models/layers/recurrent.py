"""What layers with a recurrent state share: the convolution before their rule, and the state, which has both."""

from __future__ import annotations

import cpu_kernels
from hybrid.formats.block import round_up
from hybrid.models.layers.base import StateLayout
from hybrid.ops import Buffer, Op, State, Weight

PART = "attention"  # matrices are of the format of attention, and time is booked there
LINE = 64  # bytes; states begin at one


def state_layout(rule: int, channels: int, taps: int) -> StateLayout:
    """The state of a rule, of so many bytes, then what the convolution keeps. It goes back to tokens of its run alone,
    so a step that failed cannot be run again.
    """
    nbytes = rule + round_up(cpu_kernels.conv_state_bytes(channels, taps), LINE)
    return StateLayout(nbytes, 0, "StateLayout", {}, run=cpu_kernels.RUN_TOKENS)


def convolve(
    layer: int, values: str, weight: str, rule: int, channels: int, taps: int, stride: int, bias: bool = False
) -> Op:
    """A convolution with silu of the first `channels` of rows, in place. rule: bytes of the state before its own."""
    arguments = {
        "values": Buffer(values),
        "weight": Weight(weight),
        "state": State(layer, rule),
        "width": channels,
        "taps": taps,
        "stride": stride,
    }
    if bias:
        arguments["bias"] = Weight(f"{weight}_bias")
    return Op("silu_conv", PART, arguments, (channels, "channels"))
