"""Rules of prefetch that learn from other calls than those that are replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from routing import random_trace

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.prefetch import LEARNT, learnt_rule
from gpu_cache.simulator import Result, Setting, replay
from gpu_cache.sweep import describe_trace, sweep
from gpu_cache.teaching import part_of, taught_by, taught_by_first
from gpu_cache.trace import Calls, calls, make_trace

LAYERS, EXPERTS = 3, 8
TRACE = calls(random_trace(5, steps=60, layers=LAYERS, experts=EXPERTS, top_k=2, sticky=0.7))


def chains(steps: int, shift: int) -> Calls:
    """Every step calls one expert a layer, in each layer `shift` further; every fourth begins another chain."""
    rows = [(step, layer, (step // 4 + layer * shift) % EXPERTS) for step in range(steps) for layer in range(LAYERS)]
    step, layer, expert = (np.array(column) for column in zip(*rows, strict=True))
    zeros = np.zeros_like(step)
    columns = {"step": step, "sequence": zeros, "position": step, "layer": layer, "rank": zeros, "expert": expert}
    return calls(make_trace(columns | {"score": zeros}, LAYERS, EXPERTS))


def ahead(trace: Calls) -> Result:
    return replay(trace, Setting(LAYERS, 1, prefetch="transition"))


@pytest.mark.parametrize("rule", LEARNT)
def test_following_is_learning_and_choosing(rule: str) -> None:
    one, other = (learnt_rule(rule, Geometry(LAYERS, 4, LAYERS, EXPERTS)) for _ in range(2))
    assert one and other
    for _, layer, experts, _ in TRACE:
        other.learn(layer, experts)
        chosen = [list(other.choose(layer, experts)) for _ in range(2)]  # which changes nothing
        assert chosen == [list(one.follow(layer, experts))] * 2


def test_what_teaches_is_not_replayed() -> None:
    taught = taught_by_first(replace(TRACE, named=TRACE), 0.25)
    assert taught.teacher and taught.teacher.named and taught.named
    assert (taught.teacher.steps, taught.steps) == (15, 45) and set(taught.teacher.step) <= set(range(15))
    assert [*taught.teacher, *taught] == list(TRACE) == [*taught.teacher.named, *taught.named]
    assert describe_trace(taught)["teacher"]["steps"] == 15
    plain = replay(replace(taught, teacher=None), Setting(LAYERS, 4))
    assert replay(taught, Setting(LAYERS, 4)).hits.tolist() == plain.hits.tolist()


def test_a_rule_knows_what_it_was_taught_and_learns_no_more() -> None:
    """With one slot a layer, the experts of a new chain are copied ahead, but for the first layer's."""
    same, others = taught_by_first(chains(64, 1), 0.5), taught_by(chains(32, 1), chains(32, 3))
    assert (ahead(same).used, int(ahead(same).misses.sum())) == (2 * 8, 8)
    assert (ahead(others).used, ahead(others).prefetched > 0) == (0, True)
    assert ahead(replace(same, teacher=None)).used == 0  # each chain is a new one


def test_results_are_those_of_their_teacher() -> None:
    setting = Setting(LAYERS, 2, prefetch="transition")
    taught = [taught_by_first(TRACE, share) for share in (0.25, 0.5)]
    assert len({TRACE.digest(), *(each.digest() for each in taught), replace(taught[0], teacher=None).digest()}) == 4
    settings = [setting, replace(setting, prefetch="frequency")]
    assert sweep(taught[0], settings, workers=2) == sweep(taught[0], settings)


@pytest.mark.parametrize("share", [-1, 0, 1, 0.01, float("nan")])
def test_a_share_leaves_steps_on_either_side(share: float) -> None:
    with pytest.raises(CacheError, match=f"the first {share:g} of 60 steps cannot teach"):
        taught_by_first(TRACE, share)


def test_another_model_teaches_nothing() -> None:
    with pytest.raises(CacheError, match="3 layers of 8 experts what to name of 3 of 9"):
        taught_by(replace(TRACE, experts=9), TRACE)


def test_a_rule_that_learns_while_it_chooses_cannot_be_taught(tmp_path: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(
        "from gpu_cache.prefetch import Prefetch\nclass A(Prefetch):\n    def follow(self, layer, experts):\n"
        "        return experts\n"
    )
    setting = Setting(LAYERS, 2, prefetch=str(rule))
    setting.check(TRACE)
    with pytest.raises(CacheError, match=r"rule.py line 3: A learns and chooses in follow; give it learn and choose"):
        setting.check(taught_by_first(TRACE, 0.5))


def test_parts_begin_with_the_calls_of_their_groups() -> None:
    assert list(part_of(TRACE, 7, 9)) == list(TRACE)[7:9]
