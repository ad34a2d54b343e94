"""Several streams in place of one residual stream: what a half reads of them, and what they become by its result."""

from __future__ import annotations

import numpy as np
import pytest
from rig import BF16, Rig, aligned, placed, row_stride

EPS, FLOOR = 1e-3, 1e-2


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def balanced(logits: np.ndarray, rounds: int) -> np.ndarray:
    """Softmax of rows, then columns and rows to sums of 1 in turn."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    x = e / e.sum(-1, keepdims=True) + FLOOR
    x = x / (x.sum(-2, keepdims=True) + FLOOR)
    for _ in range(rounds - 1):
        x = x / (x.sum(-1, keepdims=True) + FLOOR)
        x = x / (x.sum(-2, keepdims=True) + FLOOR)
    return x


@pytest.mark.parametrize(("count", "width", "rounds"), [(4, 40, 20), (2, 33, 1), (8, 16, 3)])
def test_a_half_reads_a_sum_and_weights_are_made_for_its_result(isa, count, width, rounds) -> None:
    random, rows, made = np.random.default_rng(width), 5, (2 + count) * count
    streams = aligned((rows, row_stride(count * width)), np.float32)
    streams[:, : count * width] = random.normal(0, 2, (rows, count * width))
    products, base = (placed(random.normal(0, 2, shape).astype(np.float32)) for shape in ((rows, made), made))
    scale = placed(np.array([0.7, 1.3, 0.5], np.float32))
    output, cleared = (aligned((rows, row_stride(width)), np.float32, fill=np.nan) for _ in range(2))
    weights = aligned((rows, (1 + count) * count), np.float32)
    rig = Rig(isa, 2, rows=rows)
    rig.add(
        "collapse", streams=streams, products=products, base=base, scale=scale, output=output, weights=weights,
        cleared=cleared, count=count, width=width, stream_stride=streams.shape[1], output_stride=output.shape[1],
        rounds=rounds, eps=EPS, floor=FLOOR,
    )  # fmt: skip
    rig.step([(0, row) for row in range(rows)])
    x = streams[:, : count * width].astype(np.float64)
    logits = products / np.sqrt((x**2).mean(1, keepdims=True) + EPS)
    logits = logits * np.repeat(scale, [count, count, count**2]) + base
    pre, post, comb = np.split(logits, [count, 2 * count], axis=1)
    wanted = ((sigmoid(pre) + FLOOR)[..., None] * x.reshape(rows, count, width)).sum(1)
    assert np.allclose(output[:, :width], wanted, rtol=1e-4, atol=1e-4) and not cleared[:, :width].any()
    assert np.allclose(weights[:, :count], 2 * sigmoid(post), rtol=1e-4)
    mixture = balanced(comb.reshape(rows, count, count), rounds)
    assert np.allclose(weights[:, count:], mixture.reshape(rows, -1), rtol=1e-4, atol=1e-6)


def test_the_head_reads_a_sum_alone(isa) -> None:
    random, rows, count, width = np.random.default_rng(1), 3, 4, 20
    streams = aligned((rows, row_stride(count * width)), np.float32)
    streams[:, : count * width] = random.normal(0, 2, (rows, count * width))
    products, base = (placed(random.normal(0, 2, shape).astype(np.float32)) for shape in ((rows, count), count))
    scale, output = placed(np.array([0.7], np.float32)), aligned((rows, row_stride(width)), np.float32)
    rig = Rig(isa, 1, rows=rows)
    rig.add(
        "collapse", streams=streams, products=products, base=base, scale=scale, output=output, weights=0, cleared=0,
        count=count, width=width, stream_stride=streams.shape[1], output_stride=output.shape[1], rounds=1, eps=EPS,
        floor=FLOOR,
    )  # fmt: skip
    rig.step([(0, row) for row in range(rows)])
    x = streams[:, : count * width].astype(np.float64)
    pre = sigmoid(products / np.sqrt((x**2).mean(1, keepdims=True) + EPS) * 0.7 + base) + FLOOR
    assert np.allclose(output[:, :width], (pre[..., None] * x.reshape(rows, count, width)).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "width"), [(4, 40), (2, 33), (8, 300)])
def test_a_result_is_spread_over_a_mixture(isa, count, width) -> None:
    random, rows = np.random.default_rng(width), 5
    made = aligned((rows, row_stride(width)), np.float32)
    made[:, :width] = random.normal(0, 1, (rows, width))
    streams = aligned((rows, row_stride(count * width)), np.float32)
    weights = placed(random.uniform(0, 1, (rows, (1 + count) * count)).astype(np.float32))
    fields = {"count": count, "width": width, "input_stride": made.shape[1], "stream_stride": streams.shape[1]}
    rig = Rig(isa, 2, rows=rows)
    rig.add("expand", input=made, weights=0, streams=streams, **fields)  # the embedding, into every stream
    rig.step([(0, row) for row in range(rows)])
    found = streams[:, : count * width].reshape(rows, count, width)
    assert (found == made[:, None, :width]).all()
    found[:] = old = random.normal(0, 1, found.shape).astype(np.float32)
    streams[:, : count * width] = found.reshape(rows, -1)
    rig = Rig(isa, 2, rows=rows)
    rig.add("expand", input=made, weights=weights, streams=streams, **fields)
    rig.step([(0, row) for row in range(rows)])
    post, comb = weights[:, :count], weights[:, count:].reshape(rows, count, count)
    wanted = post[..., None] * made[:, None, :width] + np.einsum("rjk,rjd->rkd", comb, old)
    assert np.allclose(streams[:, : count * width], wanted.reshape(rows, -1), rtol=1e-4, atol=1e-5)


def test_the_head_may_read_the_mean(isa) -> None:
    rows, count, width = 3, 3, 20
    streams = aligned((rows, row_stride(count * width)), np.float32)
    streams[:, : count * width] = np.random.default_rng(1).normal(0, 2, (rows, count * width))
    output = aligned((rows, row_stride(width)), np.float32)
    rig = Rig(isa, 1, rows=rows)
    rig.add(
        "collapse", streams=streams, products=0, base=0, scale=0, output=output, weights=0, cleared=0, count=count,
        width=width, stream_stride=streams.shape[1], output_stride=output.shape[1], rounds=1, eps=EPS, floor=FLOOR,
    )  # fmt: skip
    rig.step([(0, row) for row in range(rows)])
    wanted = streams[:, : count * width].reshape(rows, count, width).mean(1)
    assert np.allclose(output[:, :width], wanted, rtol=1e-5, atol=1e-6)


def test_streams_need_not_be_mixed(isa) -> None:
    """Then weights are those of the result alone, to which the floor is added too, as often as wanted."""
    random, rows, count, width = np.random.default_rng(2), 3, 4, 36
    streams, output = (aligned((rows, row_stride(size)), np.float32) for size in (count * width, width))
    streams[:, : count * width] = random.normal(0, 2, (rows, count * width))
    products = placed(random.normal(0, 2, (rows, 2 * count)).astype(np.float32))
    base, scale = placed(random.normal(0, 2, 2 * count).astype(np.float32)), placed(np.array([0.7, 1.3], np.float32))
    made, weights = placed(random.normal(0, 1, output.shape).astype(np.float32)), aligned((rows, count), np.float32)
    x = streams[:, : count * width].astype(np.float64)
    fields = {"count": count, "width": width, "stream_stride": streams.shape[1]}
    rig = Rig(isa, 2, rows=rows)
    rig.add(
        "collapse", streams=streams, products=products, base=base, scale=scale, output=output, weights=weights,
        cleared=0, output_stride=output.shape[1], rounds=0, eps=EPS, floor=FLOOR, magnitude=1.5, **fields,
    )  # fmt: skip
    rig.add("expand", input=made, weights=weights, streams=streams, input_stride=made.shape[1], unmixed=True, **fields)
    rig.step([(0, row) for row in range(rows)])
    logits = products / np.sqrt((x**2).mean(1, keepdims=True) + EPS) * np.repeat(scale, count) + base
    pre, post = sigmoid(logits[:, :count]) + FLOOR, 1.5 * sigmoid(logits[:, count:]) + FLOOR
    x = x.reshape(rows, count, width)
    assert np.allclose(output[:, :width], (pre[..., None] * x).sum(1), rtol=1e-4, atol=1e-4)
    assert np.allclose(weights, post, rtol=1e-4)
    wanted = x + post[..., None] * made[:, None, :width]
    assert np.allclose(streams[:, : count * width], wanted.reshape(rows, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "width"), [(4, 40), (2, 33), (8, 16)])
def test_a_mean_may_be_of_normed_streams_with_a_gate_for_every_element(isa, count, width) -> None:
    random, rows, wide = np.random.default_rng(width), 5, count * width
    streams, gates = (aligned((rows, row_stride(wide)), np.float32) for _ in range(2))
    streams[:, :wide], gates[:, :wide] = random.normal(0, 2, (2, rows, wide))
    norm = placed(random.uniform(0.5, 1.5, wide).astype(np.float32))
    output, cleared = (aligned((rows, row_stride(width)), np.float32, fill=np.nan) for _ in range(2))
    rig = Rig(isa, 2, rows=rows)
    rig.add(
        "collapse", streams=streams, products=0, base=0, scale=0, output=output, weights=0, cleared=cleared,
        count=count, width=width, stream_stride=streams.shape[1], output_stride=output.shape[1], rounds=0, eps=EPS,
        floor=0.0, norm=norm, gates=gates, gate_stride=gates.shape[1],
    )  # fmt: skip
    rig.step([(0, row) for row in range(rows)])
    x, g = (a[:, :wide].astype(np.float64).reshape(rows, count, width) for a in (streams, gates))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * norm.reshape(count, width)
    assert np.allclose(output[:, :width], (sigmoid(g) * normed).mean(1), rtol=1e-4, atol=1e-5)
    assert not cleared[:, :width].any()


@pytest.mark.parametrize("weighted", [True, False])
def test_a_product_of_low_rank_makes_gates_and_weights(isa, weighted) -> None:
    random, rows, count, rank = np.random.default_rng(3), 5, 4, 20
    low = placed(random.normal(0, 8, (rows, 64)).astype(np.float32))
    output, weights = aligned((rows, 64), BF16, fill=-7), aligned((rows, count), np.float32, fill=-7)
    rig = Rig(isa, 2, rows=rows)
    rig.add(
        "stream_gates", low=low, output=output, weights=weights if weighted else 0, count=count, rank=rank,
        low_stride=64, output_stride=64,
    )  # fmt: skip
    rig.step([(0, row) for row in range(rows)])
    x = low.astype(np.float64) / count
    assert np.allclose(output[:, :rank].astype("f4"), (x * sigmoid(x))[:, :rank], rtol=0.005, atol=1e-5)
    assert (output[:, rank:] == -7).all()
    assert np.allclose(weights, 2 * sigmoid(x[:, rank : rank + count]) if weighted else -7, rtol=1e-4)
