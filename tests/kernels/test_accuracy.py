"""What a whole MoE layer loses: to its activations, against exact arithmetic on the same weights; to its weights."""

from __future__ import annotations

import numpy as np
import pytest
from expert_rig import Experts, run
from rig import BF16

from hybrid.formats import GROUPED

HIDDEN, INTERMEDIATE, EXPERTS, ROWS, TOP_K = 256, 128, 8, 64, 2
ACTIVATIONS = dict.fromkeys(("bf16", "fp8", "fp8_row", "mxfp4", "nvfp4"), 0.006) | {"int8": 0.025, "int4": 0.025}
ACTIVATIONS |= dict.fromkeys(GROUPED, 0.025)

# Relative error of normally distributed weights, root mean square. A grid of step s loses s / sqrt(12), a float with a
# mantissa of m bits at most 2^-(m+1) / sqrt(3) of each value. Checked against what the layer loses by the rule below.
WEIGHTS = {
    "bf16": 0,  # the weights are bf16
    "int8": 5 / 127 / 12**0.5,  # no value of a column beyond 5 standard deviations
    "int4": 4 / 8 / 12**0.5,  # none of a group of 32 beyond 4
    "fp8": 2**-4 / 3**0.5,
    "fp8_row": 2**-4 / 3**0.5,
    "mxfp4": 2**-2 / 3**0.5,
    "nvfp4": 2**-2 / 3**0.5,
    "q8_0": 4 / 127 / 12**0.5,
    "q5_1": 8 / 31 / 12**0.5,  # from the smallest of a group to the largest
    "q4_k": 8 / 15 / 12**0.5,
    "q6_k": 4 / 32 / 12**0.5,
}


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def layer(matrices, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The layer in double precision: [rows, hidden] of float64."""
    gate, up, down = (np.asarray(matrix, np.float64) for matrix in matrices)
    output = np.zeros((len(x), down.shape[1]))
    for choice in range(ids.shape[1]):
        for expert in np.unique(ids[:, choice]):
            rows = ids[:, choice] == expert
            activation = swish(x[rows] @ gate[expert].T) * (x[rows] @ up[expert].T)
            output[rows] += weights[rows, choice, None] * (activation @ down[expert].T)
    return output


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def case(format: str, count=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, rows=ROWS, top_k=TOP_K):
    """Normal weights of a size that keeps gate and up near 1, normal inputs of fp32, random routing."""
    random = np.random.default_rng(7)
    shapes = [(count, intermediate, hidden)] * 2 + [(count, hidden, intermediate)]
    matrices = [(random.standard_normal(shape) / shape[2] ** 0.5).astype(BF16) for shape in shapes]
    x = random.standard_normal((rows, hidden)).astype(np.float32)
    ids = np.array([random.permutation(count)[:top_k] for _ in range(rows)], np.int32)
    weights = random.random(ids.shape).astype(np.float32)
    return Experts(format, *matrices), x, ids, weights


def activation_cost(isa: str, format: str, **sizes) -> float:
    """Relative error of a layer against double precision on the weights as they are stored."""
    experts, x, ids, weights = case(format, **sizes)
    actual = run(isa, experts, x, ids, weights, np.zeros(x.shape, np.float32)).output
    return relative(actual, layer(experts.values, x, ids, weights))


def weight_cost(format: str, **sizes) -> float:
    """Relative error of a layer, in double precision, whose weights are stored in a format."""
    experts, x, ids, weights = case(format, **sizes)
    exact = layer((experts.gate, experts.up, experts.down), x, ids, weights)
    return relative(layer(experts.values, x, ids, weights), exact)


def test_activations_cost_little(isa, format) -> None:
    assert 0 < activation_cost(isa, format) <= ACTIVATIONS[format]


def test_weights_cost_what_their_rounding_does(format) -> None:
    """The errors of three matrices add up as a 2-norm does, that of gate weighed by the slope of the activation, 1.1 at
    most where the activation itself is about half of its input: twice the error of down at most, in all 2.5 times."""
    cost = weight_cost(format)
    assert cost <= 2.5 * WEIGHTS[format]
    assert (cost == 0) == (format == "bf16")


@pytest.mark.parametrize("finer, coarser", [("int8", "fp8"), ("fp8", "int4"), ("int4", "mxfp4")])
def test_more_bits_cost_less(finer, coarser) -> None:
    assert weight_cost(finer) < weight_cost(coarser)
