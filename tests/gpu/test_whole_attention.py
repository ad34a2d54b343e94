"""Whole attention is the same whoever computes it, and who does is whoever is faster: on torch's CPU device."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from itertools import count
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

from hybrid.gpu import attention, attention_choice  # noqa: E402
from hybrid.gpu.attention_choice import AttentionShape, choose_attention, installed  # noqa: E402

CPU = torch.device("cpu")
NAMES = ["split", "torch", "xformers"]
SCALE = 0.2
SMALL = AttentionShape(2, 3, 8, 2, 24, 45)


def xformers_attention(query, key, value, attn_bias, scale) -> torch.Tensor:
    """As xformers has it: what its CUDA kernels refuse is refused, and the result is in the format of the queries."""
    (batch, rows, heads, dim), keys = query.shape, key.shape[1]
    assert key.shape == value.shape == (batch, keys, heads, dim)
    for x in (query, key, value, attn_bias):
        assert x.dtype == torch.bfloat16 and x.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in x.stride()[:-1])
    assert attn_bias.shape == (batch, heads, rows, keys)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * scale + attn_bias.float()
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.float()).bfloat16()


def install(monkeypatch, function: Any = xformers_attention) -> None:
    """A package xformers; function: None if its ops cannot be imported."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.__spec__ = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops if function else None)
    ops.memory_efficient_attention = function


@pytest.fixture
def stand_in(monkeypatch) -> None:
    install(monkeypatch)


def mask(kind: str, rows: int, keys: int) -> torch.Tensor:
    """bool [2, rows, keys], of every row one key at least."""
    if kind == "all":
        return torch.ones(2, rows, keys, dtype=torch.bool)
    if kind == "window":  # what rows of a run see in a ring; the second sequence is shorter, and ends in a hole
        last = torch.tensor([[keys - rows], [(keys - rows) // 2]]) + torch.arange(rows)
        behind = last[..., None] - torch.arange(keys)
        return (behind >= 0) & (behind < 7)
    seen = torch.rand(2, rows, keys) < 0.3
    seen[..., -1] = True
    return seen


def random_inputs(rows: int, heads: int, kv_heads: int, keys: int, kind: str, dim: int = 24) -> tuple:
    """Keys and values are those of a ring, of which more was once written; what is not seen is large."""
    torch.manual_seed(rows * 100 + keys)
    q = torch.randn(2, rows, heads, dim).bfloat16()
    k, v = (torch.randn(2, kv_heads, keys + 11, dim).bfloat16()[:, :, :keys] for _ in range(2))
    seen = mask(kind, rows, keys)
    unseen = ~seen.any(1)[:, None, :, None]
    return q, k.masked_fill(unseen, 1e3), v.masked_fill(unseen, 1e30), seen, SCALE


def plain(q, k, v, seen, scale) -> torch.Tensor:
    """By the definition, one head at a time."""
    q, k, v = q.float(), k.float(), v.float()
    group = q.shape[2] // k.shape[1]
    made = torch.zeros(q.shape)
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, head // group].transpose(1, 2) * scale
        made[:, :, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, head // group]
    return made


@pytest.mark.parametrize("kind", ["all", "window", "holes"])
@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 64), (1, 301), (5, 5), (7, 45), (33, 300)], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", NAMES)
def test_all_make_the_same(stand_in, name, heads, kv_heads, rows, keys, kind) -> None:
    inputs = random_inputs(rows, heads, kv_heads, keys, kind)
    made = installed()[name](*inputs)
    assert made.shape == (2, rows, heads, 24) and made.dtype == torch.float32
    assert (made - plain(*inputs)).abs().max() < 2**-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scores", [1, 2 * 3 * 45 * 2, 1 << 24], ids=["a row", "two rows", "all"])
def test_a_workspace_too_small_for_all_rows_takes_some_at_a_time(stand_in, monkeypatch, name, scores) -> None:
    inputs = random_inputs(7, 6, 2, 45, "holes")
    sizes, bias = [], attention._bias
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "_bias", lambda *given: sizes.append(given[0].shape[1]) or bias(*given))
    assert (installed()[name](*inputs) - plain(*inputs)).abs().max() < 2**-6
    if name != "split":
        assert sizes == {1: [1] * 7, 540: [2, 2, 2, 1], 1 << 24: [7]}[scores]


def test_heads_of_any_width(stand_in) -> None:
    for name in ("split", "torch"):
        inputs = random_inputs(3, 4, 2, 20, "holes", dim=7)
        assert (installed()[name](*inputs) - plain(*inputs)).abs().max() < 2**-6


def test_without_xformers_there_are_torch_and_ours(monkeypatch) -> None:
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: None)
    assert list(installed()) == ["split", "torch"]


def test_an_xformers_that_cannot_be_imported_is_left_out(monkeypatch) -> None:
    install(monkeypatch, None)
    assert list(installed()) == ["split", "torch"]
    monkeypatch.setattr(attention_choice, "import_module", lambda name: broken())
    assert list(installed()) == ["split", "torch"]


def broken(*_: Any, **__: Any) -> Any:
    raise OSError("libcudart.so.11.0: cannot open shared object file")


class Clock:
    """Stands still but while attention is computed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, run: Any, *seconds: float) -> Any:
        """`run`, which takes so long: from call to call in turn."""
        calls = count()

        def timed(*inputs: Any) -> Any:
            self.now += seconds[next(calls) % len(seconds)]
            return run(*inputs)

        return timed


def choose_among(monkeypatch, shape: AttentionShape = SMALL, **seconds: float) -> attention_choice.AttentionChoice:
    clock, known = Clock(), installed()
    candidates = {name: clock.taking(known[name], taken) for name, taken in seconds.items()}
    monkeypatch.setattr(attention_choice, "installed", lambda: candidates)
    choice = choose_attention(shape, CPU, clock=clock)
    assert choice.run is candidates[choice.name]
    return choice


@pytest.mark.parametrize("fastest", NAMES)
def test_the_fastest_is_chosen(stand_in, monkeypatch, fastest) -> None:
    seconds = {name: 1.0 if name == fastest else 2.0 for name in NAMES}
    choice = choose_among(monkeypatch, **seconds)
    assert choice.name == fastest and choice.seconds == pytest.approx(seconds)
    inputs = random_inputs(3, 8, 2, 45, "holes")
    assert (choice.run(*inputs) - plain(*inputs)).abs().max() < 2**-6


def test_calls_that_took_long_now_and_then_do_not_count(stand_in, monkeypatch) -> None:
    clock, known = Clock(), installed()
    candidates = {
        "split": clock.taking(known["split"], 1.0),
        "torch": clock.taking(known["torch"], 0.5, 0.5, 100.0),
    }
    monkeypatch.setattr(attention_choice, "installed", lambda: candidates)
    choice = choose_attention(SMALL, CPU, clock=clock)
    assert choice.name == "torch" and choice.seconds == pytest.approx({"split": 1.0, "torch": 0.5})


@pytest.mark.parametrize("shape", [SMALL, AttentionShape(3, 1, 4, 4, 16, 1), AttentionShape(1, 40, 4, 2, 32, 77)])
def test_all_work_at_the_shapes_of_a_step(stand_in, monkeypatch, shape) -> None:
    assert set(choose_among(monkeypatch, shape, split=1.0, torch=1.0, xformers=1.0).seconds) == set(NAMES)


def test_keys_to_measure_with_fit_the_workspace(monkeypatch) -> None:
    monkeypatch.setattr(attention_choice, "SCORES", 2 * 2 * 24 * 600)
    for asked, there in [(1, 1), (101, 101), (512, 512), (513, 512), (10**12, 512)]:
        q, k, v, seen, _ = attention_choice._random_inputs(AttentionShape(2, 3, 8, 2, 24, asked), CPU)
        assert q.shape == (2, 3, 8, 24) and k.shape == v.shape == (2, 2, there, 24) and seen.shape == (2, 3, there)
        assert seen.any(-1).all()


@pytest.mark.parametrize(
    "error", [RuntimeError, NotImplementedError, ValueError, torch.OutOfMemoryError, AssertionError]
)
def test_what_fails_when_called_is_left_out(monkeypatch, error) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise error("No operator found for `memory_efficient_attention_forward`")

    install(monkeypatch, refuses)
    choice = choose_among(monkeypatch, split=2.0, torch=1.0, xformers=0.5)
    assert choice.name == "torch" and set(choice.seconds) == {"split", "torch"}


def stumbling(query, key, value, attn_bias, scale) -> torch.Tensor:
    """Makes NaN of parts of the keys that no row sees."""
    made = xformers_attention(query, key, value, attn_bias, scale)
    return made * torch.nan if attn_bias[..., 0].isinf().all() else made


def aligned(query, key, value, attn_bias, scale) -> torch.Tensor:
    """Some versions refuse such a bias even where it lies in a wider one."""
    if attn_bias.shape[-1] % 8:
        raise NotImplementedError("attn_bias.shape[-1] % 8 != 0")
    return xformers_attention(query, key, value, attn_bias, scale)


def unmasked(query, key, value, attn_bias, scale) -> torch.Tensor:
    return xformers_attention(query, key, value, torch.zeros_like(attn_bias), scale)


def unscaled(query, key, value, attn_bias, scale) -> torch.Tensor:
    return xformers_attention(query, key, value, attn_bias, 1.0)


@pytest.mark.parametrize("wrong", [stumbling, aligned, unmasked, unscaled], ids=lambda wrong: wrong.__name__)
def test_what_would_fail_in_a_step_or_be_wrong_there_is_left_out(monkeypatch, wrong) -> None:
    install(monkeypatch, wrong)
    choice = choose_among(monkeypatch, split=2.0, torch=1.0, xformers=0.5)
    assert choice.name == "torch" and set(choice.seconds) == {"split", "torch"}


def test_what_needs_keys_in_eights_may_have_them(monkeypatch) -> None:
    install(monkeypatch, aligned)
    shape = AttentionShape(2, 3, 8, 2, 24, 64)
    assert choose_among(monkeypatch, shape, split=2.0, torch=1.0, xformers=0.5).name == "xformers"


def test_what_steps_replay_is_timed_as_a_replay(monkeypatch) -> None:
    """Launching torch's takes longer here, running it does not."""
    clock, replays = Clock(), iter([3.0, 2.0])
    candidates = {name: clock.taking(run, 1.0 + (name == "torch")) for name, run in installed().items()}
    monkeypatch.setattr(attention_choice, "installed", lambda: candidates)

    def capture(work: Any) -> tuple[Any, Any]:
        return clock.taking(lambda: None, next(replays)), work()

    assert choose_attention(SMALL, CPU, clock=clock).name == "split"
    choice = choose_attention(SMALL, CPU, capture, clock)
    assert choice.name == "torch" and choice.seconds == pytest.approx({"split": 3.0, "torch": 2.0})


def test_what_cannot_be_captured_is_left_out(stand_in) -> None:
    captured: list[int] = []

    def capture(work: Any) -> tuple[Any, Any]:
        captured.append(len(captured))
        if captured[-1] == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: None, work()

    assert list(choose_attention(SMALL, CPU, capture, Clock()).seconds) == ["split", "torch"]


def test_where_nothing_works_torch_is_left_to_say_so(monkeypatch) -> None:
    monkeypatch.setattr(attention_choice, "installed", lambda: {"split": broken, "torch": broken})
    choice = choose_attention(SMALL, CPU, clock=Clock())
    assert (choice.name, choice.run, choice.seconds) == ("torch", broken, {})


def test_without_memory_to_measure_nothing_is(monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_choice, "_random_inputs", full)
    choice = choose_attention(SMALL, CPU, clock=Clock())
    assert (choice.name, choice.run, choice.seconds) == ("torch", attention.attend_whole, {})


def test_on_a_cpu_nothing_is_measured(stand_in, monkeypatch) -> None:
    monkeypatch.setattr(attention_choice, "_measure", broken)
    choice = choose_attention(SMALL, CPU)
    assert (choice.name, choice.run, choice.seconds) == ("torch", attention.attend_whole, {})
