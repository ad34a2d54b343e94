"""`hybrid verify` finds nothing where there is nothing, and says where a difference is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from cuda_rig import SlotCompute, put
from typer.testing import CliRunner

import gpu_cache.policies
from hybrid.cli import COMMANDS
from hybrid.commands import verify
from hybrid.commands.tolerance import LogitError, measure_logit_error
from hybrid.commands.verify import Answers, compare_within_tolerance, first_difference, make_scenarios, verify_model
from hybrid.config import CacheConfig, EngineConfig
from hybrid.errors import ConfigError
from hybrid.machine import gpu as usable
from hybrid.machine.memory import view
from hybrid.plan.expert_shape import ExpertShape
from hybrid.plan.passes.place_experts import CONTRIBUTIONS

CONFIG = EngineConfig(max_seq_len=256)
SHORT = ["--max-tokens", "8", "--max-seq-len", "256"]
SHAPE = ExpertShape(tuple(range(16)), 16, 2, (("experts", 1000),), 500)


def test_the_embedded_model_gives_the_same_in_every_scenario() -> None:
    result = CliRunner().invoke(verify.app, SHORT)
    assert result.exit_code == 0, result.output
    scenarios = len(list(make_scenarios(SHAPE)))
    assert f"{scenarios} of {scenarios} scenarios give the same" in result.stdout
    streamed = {line.split("  ")[0]: line.split()[-2] for line in result.stdout.splitlines()[1:-1]}
    assert int(streamed["streamed"]) > 100 and streamed["starved"] == "0"


@pytest.fixture
def two_policies(monkeypatch) -> None:
    """A scenario for each policy costs minutes on a stand-in for a GPU; that all agree is another test's matter."""
    monkeypatch.setattr(
        gpu_cache.policies, "POLICIES", {name: gpu_cache.policies.POLICIES[name] for name in ("LRU", "random")}
    )


@pytest.mark.usefixtures("two_policies")
def test_a_wrong_expert_is_found_and_ends_with_1(monkeypatch) -> None:
    from gpu_cache.devices.simulated import SimulatedDevice

    copy = SimulatedDevice._copy
    monkeypatch.setattr(SimulatedDevice, "_copy", lambda self, slot, key, stop: copy(self, slot, key ^ 1, stop))
    result = CliRunner().invoke(verify.app, [*SHORT, "--json"])
    assert result.exit_code == 1
    outcomes = {outcome["scenario"]: outcome["difference"] for outcome in json.loads(result.stdout)["results"]}
    assert outcomes["delay 0"] and outcomes["streamed"] and outcomes["starved"] is None
    assert result.stderr.startswith("different: ")


def test_the_first_difference_is_named() -> None:
    bits = np.zeros((3, 4), np.uint32)
    right = Answers([[1, 2], [3, 4]], bits)
    assert first_difference(right, right) is None
    assert first_difference(right, Answers([[1, 2], [3, 5]], bits)) == "prompt 1, token 1: 5 instead of 4"
    assert first_difference(right, Answers([[1, 2], [3]], bits)) == "prompt 1: 1 tokens instead of 2"
    other = bits.copy()
    other[2, 3] = 1
    assert "token 2" in (first_difference(right, replace(right, logits=other)) or "")


class Off(SlotCompute):
    """A device whose experts' results are off by `share`."""

    share = 0.0

    def __init__(self, plan, memory, address) -> None:
        super().__init__(plan, memory, address)
        pairs = plan.max_rows, plan.cache.shape.top_k
        width = plan.buffers[CONTRIBUTIONS][1] // (pairs[0] * pairs[1] * 4)
        self._contributions = view(address(CONTRIBUTIONS), (*pairs, width), np.float32)

    def experts(self, ids: range, slot: int) -> None:
        super().experts(ids, slot)
        rows, ranks = np.nonzero((self._slot_ids >= ids.start) & (self._slot_ids < ids.stop))
        self._contributions[rows, ranks] *= 1 + self.share


def on_gpu(monkeypatch, share: float, *arguments: str):
    put(monkeypatch, compute=type("Off", (Off,), {"share": share}))
    return CliRunner().invoke(verify.app, [*SHORT, "--device", "cuda", *arguments])


@pytest.mark.usefixtures("two_policies")
def test_a_gpu_may_be_off_by_rounding(monkeypatch) -> None:
    result = on_gpu(monkeypatch, 0.001)
    assert result.exit_code == 0, result.output
    head, *lines, last = result.stdout.splitlines()
    assert head.split()[-4:] == ["error", "far", "agree", "result"]
    quick = [scenario for scenario in make_scenarios(SHAPE) if not scenario.slow]
    assert len(lines) == len(quick) < len(list(make_scenarios(SHAPE)))
    assert last == f"{len(quick)} of {len(quick)} scenarios give logits within rounding of those of the CPU"
    errors = {line.split("  ")[0]: float(line.split()[-4]) for line in lines}
    assert errors["starved"] == 0 < errors["streamed"] < 0.01


@pytest.mark.usefixtures("two_policies")
def test_a_gpu_that_is_wrong_is_found_and_ends_with_1(monkeypatch) -> None:
    result = on_gpu(monkeypatch, 0.5, "--json")
    assert result.exit_code == 1
    outcomes = {outcome["scenario"]: outcome for outcome in json.loads(result.stdout)["results"]}
    assert "off by" in outcomes["streamed"]["difference"] and outcomes["streamed"]["median_error"] > 0.02
    assert outcomes["starved"]["difference"] is None and outcomes["starved"]["far_tokens"] == 0
    assert result.stderr.startswith("different: ")


def test_a_gpu_that_cannot_be_used_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(usable, "why_unusable", lambda: "no NVIDIA driver is installed")
    result = CliRunner().invoke(verify.app, [*SHORT, "--device", "cuda"])
    assert result.exit_code == 2 and "no NVIDIA driver" in result.stderr and result.stderr.count("\n") == 1
    result = CliRunner().invoke(verify.app, [*SHORT, "--device", "cpu"])
    assert result.exit_code == 2 and "allowed: simulated, cuda" in result.stderr


def test_logit_errors_have_limits() -> None:
    expected = np.ones((20, 4), np.float32)
    found = expected * 1.01
    assert measure_logit_error(found, expected).problem is None
    found[:2] = -1
    assert measure_logit_error(found, expected) == LogitError(pytest.approx(0.01, abs=1e-4), 0.1)
    assert measure_logit_error(found, expected).problem is None
    found[2] = -1
    assert "15% of tokens" in (measure_logit_error(found, expected).problem or "")
    found[2, 0] = np.nan
    assert measure_logit_error(found, expected) == LogitError(1.0, 1.0)
    assert "0.03 in the median" in (measure_logit_error(expected * 1.03, expected).problem or "")
    assert measure_logit_error(expected * 1.03, expected, quantised=True).problem is None


def test_tokens_of_a_gpu_agree_up_to_the_first_that_differs() -> None:
    right, found = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)
    other = Answers([[1, 2, 3], [4, 9, 6]], found)
    difference, figures = compare_within_tolerance(Answers([[1, 2, 3], [4, 5, 6]], right), other)
    assert difference is None and figures["agreeing_tokens"] == 4 / 6


def test_scenarios_name_every_policy_mapping_and_admission() -> None:
    from gpu_cache.admission import ADMISSIONS
    from gpu_cache.geometry import MAPPINGS
    from gpu_cache.policies import POLICIES

    for thorough in (False, True):
        caches = [scenario.cache for scenario in make_scenarios(SHAPE, thorough)]
        assert {cache.policy for cache in caches} == set(POLICIES)
        assert {cache.mapping for cache in caches} == set(MAPPINGS)
        assert {cache.admission for cache in caches} == set(ADMISSIONS)
        assert any(cache.quota == 0 for cache in caches) and any(cache.nways == SHAPE.top_k for cache in caches)
    assert len(caches) >= len(POLICIES) * len(MAPPINGS) * len(ADMISSIONS)
    assert all(cache.poison for cache in caches) and any(cache.stream == "on" for cache in caches)
    assert CacheConfig(16, 4, stream="off", poison=True) in caches


@pytest.mark.parametrize("slots", [1, 2, 20, 40])
def test_scenarios_have_no_more_slots_than_the_device(slots) -> None:
    caches = [scenario.cache for scenario in make_scenarios(SHAPE, True, slots)]
    assert 0 < max(cache.nblocks * cache.nways for cache in caches) <= slots
    assert len(caches) == len(list(make_scenarios(SHAPE, True)))


def test_a_model_without_experts_is_refused(tmp_path) -> None:
    from checkpoints import write_checkpoint

    path = write_checkpoint(tmp_path / "hf", "llama")
    with pytest.raises(ConfigError, match="no experts"):
        verify_model(replace(CONFIG, model_path=path, cache_dir=tmp_path / "cache"), ["x"], 2)


def test_it_is_a_command() -> None:
    assert COMMANDS["verify"][0] == "hybrid.commands.verify"
