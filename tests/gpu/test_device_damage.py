"""On a device too NaN and infinity stay what they are, in their row: in the kernels, their reference and torch's parts.

In Triton's interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
from expert_rig import Experts

pytest.importorskip("triton", reason="triton is not installed: pip install '.[live]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

from gpu_cache.kernels import reference  # noqa: E402
from gpu_cache.kernels.experts import ExpertKernels, ExpertLayout  # noqa: E402
from gpu_cache.kernels.router import TopK, choose  # noqa: E402
from gpu_cache.kernels.sums import weighted_sums  # noqa: E402
from hybrid.gpu.attention import attend, finish, join  # noqa: E402
from hybrid.gpu.parts import GatedWeights, choose_by_torch, gated  # noqa: E402
from hybrid.models.layers.feed_forward import Router  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
DAMAGED = 2  # the row that gets it


@pytest.fixture(params=KINDS)
def value(request: pytest.FixtureRequest) -> float:
    return KINDS[request.param]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def assert_only_its_row(made: torch.Tensor, clean: torch.Tensor) -> None:
    """None of the damaged row is finite; all others are the same bits."""
    others = torch.arange(len(clean)) != DAMAGED
    assert not made[DAMAGED].isfinite().any() and clean.isfinite().all()
    assert torch.equal(made[others], clean[others])


ROUTERS = [
    TopK("softmax", 12, 3),
    TopK("softmax", 12, 3, renormalise=False),
    TopK("topk_softmax", 5, 3),
    TopK("sigmoid", 16, 4, groups=4, top_groups=2),
    TopK("sparsemixer", 16, 2, jitter=0.1),
]


@pytest.mark.parametrize("top", ROUTERS, ids=str)
def test_routers(top, value) -> None:
    place = {"softmax": 0, "topk_softmax": 4}.get(top.kind, 3)
    logits = random(5, top.experts)
    planted = logits.clone()
    planted[DAMAGED, place] = value
    for by in (choose, lambda x, top: tuple(y.to(DEVICE) for y in reference.choose(x.cpu(), top))):
        (ids, weights), (clean_ids, clean) = by(planted, top), by(logits, top)
        assert_only_its_row(weights, clean)
        assert ids[DAMAGED].tolist() == list(range(top.top_k))
        assert torch.equal(ids[:DAMAGED], clean_ids[:DAMAGED])


def test_a_correction_of_scores(value) -> None:
    top, correction = TopK("sigmoid", 8, 2), torch.zeros(8, device=DEVICE)
    correction[5] = value
    ids, weights = choose(random(3, 8), top, correction)
    assert weights.isnan().all() and ids.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("router", [Router(3), Router(2, kind="topk_softmax")], ids=str)
def test_the_router_of_torch(router, value) -> None:
    logits = random(5, 9)
    planted = logits.clone()
    planted[DAMAGED, 4] = value
    (ids, weights), (_, clean) = choose_by_torch(planted, router, None), choose_by_torch(logits, router, None)
    assert_only_its_row(weights, clean)
    assert len(set(ids[DAMAGED].tolist())) == router.top_k


@pytest.mark.parametrize(
    ("which", "activation", "rows", "value"),
    [
        (0, "swiglu_clamped", 3, np.nan),
        (1, "swiglu_clamped", 3, np.inf),
        (2, "silu", 3, -np.inf),
        (0, "silu", 18, np.nan),
    ],
)
def test_experts(which, activation, rows, value) -> None:
    """Damage in the bias of gate, up or down of an expert is that of its pairs."""
    slots, hidden, intermediate = 2, 16, 16
    layout = ExpertLayout("bf16", hidden, intermediate, activation, bias=True)
    ids = torch.tensor([[row % 2, -1] for row in range(rows)], dtype=torch.int32, device=DEVICE)
    x = torch.zeros((rows, layout.hidden_stride), dtype=torch.bfloat16, device=DEVICE)
    x[:, :hidden] = random(rows, hidden)

    def contributions(damaged: bool) -> tuple[torch.Tensor, torch.Tensor]:
        experts = Experts.make("bf16", slots, hidden, intermediate, bias=True, activation=activation)
        if damaged:
            experts.biases[which][1] = value
        pieces = [experts.packed, *experts.packed_biases]
        memory = [torch.from_numpy(piece.reshape(slots, -1).view(np.uint8).copy()).to(DEVICE) for piece in pieces]
        made = ExpertKernels(layout, memory, rows, 2).run(x, ids).reshape(rows, 2, -1)[..., :hidden].clone()
        host = [piece.cpu() for piece in memory]
        gates = reference.gate_up(x.cpu(), ids.cpu(), host, layout)
        return made, reference.down(gates, ids.cpu(), host, layout)

    for made, clean in zip(contributions(True), contributions(False), strict=True):
        mine = ids.to(made.device) == 1
        assert not made[mine].isfinite().any() and clean.isfinite().all()
        assert torch.equal(made[~mine], clean[~mine])


def test_sums_of_experts(value) -> None:
    ids = torch.tensor([[0, 1]] * 4, dtype=torch.int32, device=DEVICE)
    weights, contributions = random(4, 2), random(8, 30)

    def sums(weights: torch.Tensor, contributions: torch.Tensor) -> torch.Tensor:
        return weighted_sums(contributions, ids, weights, ids, torch.empty((4, 30), device=DEVICE))

    clean, planted, broken = sums(weights, contributions), weights.clone(), contributions.clone()
    planted[DAMAGED, 1], broken[2 * DAMAGED] = value, value
    assert_only_its_row(sums(planted, contributions), clean)
    assert_only_its_row(sums(weights, broken), clean)


@pytest.mark.parametrize("which", range(3))
def test_a_gated_feed_forward(which, value) -> None:
    biases = [torch.zeros(16, device=DEVICE), torch.zeros(16, device=DEVICE), torch.zeros(8, device=DEVICE)]
    biases[which] += value
    shapes = ((16, 8), (16, 8), (8, 16))
    weights = GatedWeights(*(random(*shape).bfloat16() for shape in shapes), *biases)
    assert not gated(random(3, 8).bfloat16(), weights, "swiglu_clamped").isfinite().any()


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_attention(which, value) -> None:
    """Two sequences of three rows; damage of the second row of one, and whoever sees its key or value."""
    tensors = {"q": random(2, 3, 4, 16), "k": random(2, 2, 600, 16), "v": random(2, 2, 600, 16)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    seen = torch.arange(600)[None, None] <= torch.tensor([[597, 598, 599], [3, 4, 5]])[..., None]
    sinks = torch.zeros(4, device=DEVICE)

    def attended(tensors: dict[str, torch.Tensor], sinks: torch.Tensor | None) -> torch.Tensor:
        halves = [(slice(0, 300)), slice(300, 600)]
        q, k, v, mask = tensors["q"], tensors["k"], tensors["v"], seen.to(DEVICE)
        states = [attend(q, k[:, :, half], v[:, :, half], mask[..., half], 0.25) for half in halves]
        return finish(join(*states), sinks)

    planted = {name: tensor.clone() for name, tensor in tensors.items()}
    planted[which][(0, 1) if which == "q" else (0, slice(None), 598)] = value
    for share in (None, sinks):
        made, clean = attended(planted, share), attended(tensors, share)
        assert not made[0, 1].isfinite().all() and torch.equal(made[1], clean[1])
        if which == "q":
            assert torch.equal(made[0, [0, 2]], clean[0, [0, 2]])
