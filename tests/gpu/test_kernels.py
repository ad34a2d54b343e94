"""Every Triton kernel against its torch reference, and the references against the packed layout of the host.

In Triton's interpreter, and on a GPU where there is one (`-m gpu`).
"""

from __future__ import annotations

import numpy as np
import pytest
from expert_rig import Experts

pytest.importorskip("triton", reason="triton is not installed: pip install '.[live]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")
ON_GPU = torch.cuda.is_available()

from gpu_cache.kernels import reference  # noqa: E402
from gpu_cache.kernels.experts import FEW_ROWS, ExpertKernels, ExpertLayout  # noqa: E402
from gpu_cache.kernels.formats import FORMATS, block_bytes  # noqa: E402
from gpu_cache.kernels.grouping import tiles_of  # noqa: E402
from gpu_cache.kernels.lookup import slots_of  # noqa: E402
from gpu_cache.kernels.router import TopK, choose  # noqa: E402
from gpu_cache.kernels.sums import weighted_sums  # noqa: E402
from hybrid.formats import FORMATS as PACKED  # noqa: E402
from hybrid.formats.block import round_up  # noqa: E402
from hybrid.formats.packed import down_offset, expert_bytes  # noqa: E402
from hybrid.gpu.parts import RouterWeights, choose_by_kernel, choose_by_torch, route  # noqa: E402
from hybrid.models.layers.router import Router  # noqa: E402
from hybrid.plan.expert_cache import SLOT_FORMATS  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
SLOTS, TOP_K = 3, 2
SIZES = ((72, 40), (200, 24))  # hidden, intermediate: neither blocks of 16 nor chunks of 64 come out even
ROWS = (1, 2, 3, 17, 33)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (40, 72), (33, 300), (100, 1)])
def test_the_reference_reads_what_the_host_packs(format, n, k) -> None:
    weight = np.random.default_rng(n + k).standard_normal((n, k)).astype(np.float32)
    packed, inputs = PACKED[format].pack(weight), round_up(k, 64)
    assert block_bytes(format, inputs) == PACKED[format].block_bytes(inputs) == packed.shape[1]
    assert FORMATS[format].header_bytes(inputs) == PACKED[format].header_bytes(inputs)
    values = FORMATS[format].unpack(torch.from_numpy(packed), inputs)[:n, :k]
    assert np.array_equal(values.numpy(), PACKED[format].unpack(packed, n, k))


def test_plans_know_which_formats_have_kernels() -> None:
    assert set(SLOT_FORMATS) == set(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_the_layout_of_an_expert_is_that_of_the_host(format) -> None:
    for hidden, intermediate in SIZES:
        layout = ExpertLayout(format, hidden, intermediate)
        assert layout.nbytes == expert_bytes(format, hidden, intermediate)
        assert layout.down_offset == down_offset(format, hidden, intermediate)


def experts_on_device(format, hidden, intermediate, bias, activation):
    """(memory of the slots, layout)."""
    made = Experts.make(format, SLOTS, hidden, intermediate, bias=bias, activation=activation, seed=hidden)
    pieces = [made.packed, *(made.packed_biases if bias else ())]
    memory = [torch.from_numpy(piece.reshape(SLOTS, -1).view(np.uint8).copy()).to(DEVICE) for piece in pieces]
    return memory, ExpertLayout(format, hidden, intermediate, activation, bias)


def rows_on_device(random, rows: int, layout: ExpertLayout):
    x = torch.zeros((rows, layout.hidden_stride), dtype=torch.bfloat16)
    x[:, : layout.hidden] = torch.from_numpy(random.standard_normal((rows, layout.hidden)).astype(np.float32))
    return x.to(DEVICE)


def some_slots(random, rows: int):
    """int32 [rows, top_k]: distinct slots in a row, some of them -1, never all of them everywhere."""
    slots = np.argsort(random.random((rows, SLOTS)), axis=1)[:, :TOP_K].astype(np.int32)
    slots[random.random(slots.shape) < 0.3] = -1
    slots[0, 0] = 2 if slots[0, 1] != 2 else 1
    return torch.from_numpy(slots).to(DEVICE)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", FORMATS)
def test_experts_of_slots(format, rows) -> None:
    check_experts(format, *SIZES[0], rows)


@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.parametrize("format", FORMATS)
def test_experts_with_biases_and_the_activation_of_gpt_oss(format, rows) -> None:
    check_experts(format, *SIZES[1], rows, bias=True, activation="swiglu_clamped")


def check_experts(format, hidden, intermediate, rows, bias=False, activation="silu") -> None:
    random = np.random.default_rng(rows)
    memory, layout = experts_on_device(format, hidden, intermediate, bias, activation)
    x, slots = rows_on_device(random, rows, layout), some_slots(random, rows)
    kernels = ExpertKernels(layout, memory, rows, TOP_K)
    kernels.contributions.fill_(7.0)
    found = kernels.run(x, slots).cpu().reshape(rows, TOP_K, -1)
    memory, x, slots = [piece.cpu() for piece in memory], x.cpu(), slots.cpu()
    ours = slots >= 0
    assert ours.any() and (rows < 3 or not ours.all())
    activation = kernels.activation.cpu().float().reshape(rows, TOP_K, -1)[..., :intermediate]
    wanted = reference.gate_up(x, slots, memory, layout)
    # bf16, which the interpreter cuts off instead of rounding; where gate and up cancel, a sum in another order
    assert (activation - wanted)[ours].abs().le(wanted[ours].abs() * 2**-7 + wanted[ours].abs().max() * 2**-18).all()
    wanted = reference.down(activation, slots, memory, layout)  # of what the kernel made, so that only sums differ
    assert (found[..., :hidden] - wanted)[ours].abs().max() <= wanted[ours].abs().max() * 2**-18
    assert (found[~ours] == 7.0).all(), "a pair that is none of ours was written"
    assert not kernels.activation[:, layout.gate_up_blocks * 16 :].any()


@pytest.mark.parametrize("format", FORMATS)
def test_a_result_depends_on_its_row_and_expert_alone(format) -> None:
    """What `--strict-placement` rests on: not on other rows, on the slot, nor on what else hits."""
    random = np.random.default_rng(5)
    memory, layout = experts_on_device(format, *SIZES[0], False, "silu")
    for rows in (3, FEW_ROWS + 3):
        x, slots = rows_on_device(random, rows, layout), some_slots(random, rows)
        found = ExpertKernels(layout, memory, rows, TOP_K).run(x, slots).clone()
        turned = [piece.roll(1, dims=0) for piece in memory]  # every expert in another slot
        alone = torch.where(slots == slots[0, 0], (slots + 1) % SLOTS, -1).int()  # and only one of them there
        again = ExpertKernels(layout, turned, rows, TOP_K).run(x, alone)
        same = (slots == slots[0, 0]).reshape(-1)
        assert torch.equal(found[same], again[same])


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("pairs", "slots"), [((1, 1), 1), ((33, 2), 3), ((9, 8), 40), ((200, 2), 5)])
def test_tiles_have_every_pair_once(pairs, slots, rows) -> None:
    random = np.random.default_rng(rows)
    slot_ids = torch.from_numpy(random.integers(-1, slots, pairs).astype(np.int32))
    tiles = tiles_of(slot_ids, slots, rows)
    seen = []
    for slot, first, last in zip(tiles.slot.tolist(), tiles.first.tolist(), tiles.last.tolist(), strict=True):
        own = tiles.order[first:last]
        assert len(own) <= rows and (slot < 0) == (len(own) == 0)
        assert (slot_ids.reshape(-1)[own.long()] == slot).all()
        seen += own.tolist()
    assert sorted(seen) == (slot_ids.reshape(-1) >= 0).nonzero().reshape(-1).tolist()


@pytest.mark.parametrize("width", [64, 300])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_sums_in_the_order_of_experts(top_k, width) -> None:
    random = np.random.default_rng(top_k)
    rows = 5
    ids = torch.from_numpy(np.argsort(random.random((rows, 20)), axis=1)[:, :top_k].astype(np.int32))
    slots = torch.from_numpy(random.integers(-1, 3, (rows, top_k)).astype(np.int32))
    slots[0] = -1
    contributions = torch.from_numpy(random.standard_normal((rows * top_k, width)).astype(np.float32))
    weights = torch.rand((rows, top_k))
    out = torch.full((rows, width), 9.0).to(DEVICE)
    weighted_sums(*(part.to(DEVICE) for part in (contributions, ids, weights, slots)), out)
    wanted = reference.weighted_sums(contributions.reshape(rows, top_k, width), ids, weights, slots)
    assert (out.cpu() - wanted).abs().max() <= 1e-6 * top_k
    assert not out[0].any()
    turned = torch.arange(top_k).roll(1)  # ranks in another order: the same bits
    parts = (
        contributions.reshape(rows, top_k, width)[:, turned].reshape(-1, width),
        *(p[:, turned].contiguous() for p in (ids, weights, slots)),
    )  # noqa: E501
    again = weighted_sums(*(part.to(DEVICE) for part in parts), torch.empty_like(out))
    assert torch.equal(out, again)


@pytest.mark.parametrize(
    "top",
    [
        TopK("softmax", 128, 8),
        TopK("softmax", 60, 4, renormalise=False),
        TopK("softmax", 5, 1, scale=2.5),
        TopK("softmax", 64, 6, renormalise=False, groups=8, top_groups=3),
        TopK("topk_softmax", 32, 4),
        TopK("sigmoid", 16, 4, renormalise=False),
        TopK("sigmoid", 64, 6, scale=2.5, groups=8, top_groups=3),
        TopK("sigmoid", 24, 3, groups=4, top_groups=2),
        TopK("sparsemixer", 16, 2, jitter=0.3),
        TopK("sparsemixer", 16, 2, jitter=0.01),
    ],
    ids=str,
)
def test_rows_choose_their_experts(top) -> None:
    logits = torch.randn((7, top.experts + 1), generator=torch.Generator().manual_seed(top.experts))
    logits[0, : top.experts] = 0.25  # all alike: the lowest
    correction = torch.randn(top.experts, generator=torch.Generator().manual_seed(1)) if top.kind == "sigmoid" else None
    ids, weights = choose(logits.to(DEVICE), top, correction if correction is None else correction.to(DEVICE))
    right_ids, right_weights = reference.choose(logits, top, correction)
    assert torch.equal(ids.cpu(), right_ids)
    assert torch.allclose(weights.cpu(), right_weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "router",
    [
        Router(4),
        Router(3, renormalise=False, scale=2.5),
        Router(2, kind="topk_softmax", scale=0.5),
        Router(3, renormalise=False, groups=4, top_groups=2),
        Router(3, kind="sigmoid", correction=True, groups=4, top_groups=2),
    ],
    ids=str,
)
def test_a_step_chooses_the_same_by_the_kernel_and_by_torch(router) -> None:
    rows = torch.randn((5, 32), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weight = torch.randn((13, 32), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    correction = torch.randn(12, generator=torch.Generator().manual_seed(4)).to(DEVICE) if router.correction else None
    weights = RouterWeights(weight, None, correction)
    by_kernel, by_torch = (route(rows, weights, router, True, by) for by in (choose_by_kernel, choose_by_torch))
    assert torch.equal(by_kernel.ids, by_torch.ids) and by_kernel.ids.dtype == by_torch.ids.dtype
    assert torch.allclose(by_kernel.weights, by_torch.weights, rtol=1e-5, atol=1e-7)


def test_experts_are_looked_up_on_the_device() -> None:
    slot_of = torch.tensor([5, -1, 7, 2, -1, 0, 3, -1, 9], dtype=torch.int32)
    ids = torch.tensor([[0, 2], [1, -1], [2, 0]], dtype=torch.int32)
    found = slots_of(ids.to(DEVICE), slot_of.to(DEVICE), 3, torch.empty_like(ids).to(DEVICE))
    assert found.tolist() == [[2, 0], [-1, -1], [0, 2]]
    many = torch.arange(9, dtype=torch.int32).repeat(100).to(DEVICE)
    assert torch.equal(slots_of(many, slot_of.to(DEVICE), 0, torch.empty_like(many)).cpu(), slot_of.repeat(100))


@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.5])
def test_the_reference_of_sparsemixer_is_that_of_transformers(jitter) -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = torch.randn((40, 16), generator=torch.Generator().manual_seed(1))
    wanted_weights, wanted = sparsemixer(logits, jitter_eps=jitter, training=False)
    ids, weights = reference.choose(logits, TopK("sparsemixer", 16, 2, jitter=jitter))
    assert torch.equal(ids.long(), wanted) and torch.allclose(weights, wanted_weights)
