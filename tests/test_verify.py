"""`hybrid verify` finds nothing where there is nothing, and says where a difference is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from hybrid import verify
from hybrid.cli import COMMANDS
from hybrid.config import CacheConfig, EngineConfig
from hybrid.errors import ConfigError
from hybrid.placement import ExpertShape
from hybrid.verify import Answers, first_difference, make_scenarios, verify_model

CONFIG = EngineConfig(max_seq_len=256)
SHAPE = ExpertShape(tuple(range(16)), 16, 2, (("experts", 1000),), 500)


def test_the_embedded_model_gives_the_same_in_every_scenario() -> None:
    result = CliRunner().invoke(verify.app, ["--max-tokens", "8", "--max-seq-len", "256"])
    assert result.exit_code == 0, result.output
    scenarios = len(list(make_scenarios(SHAPE)))
    assert f"{scenarios} of {scenarios} scenarios give the same" in result.stdout
    streamed = {line.split("  ")[0]: line.split()[-2] for line in result.stdout.splitlines()[1:-1]}
    assert int(streamed["streamed"]) > 100 and streamed["starved"] == "0"


def test_a_wrong_expert_is_found_and_ends_with_1(monkeypatch) -> None:
    from gpu_cache.devices.simulated import SimulatedDevice

    copy = SimulatedDevice._copy
    monkeypatch.setattr(SimulatedDevice, "_copy", lambda self, slot, key, stop: copy(self, slot, key ^ 1, stop))
    result = CliRunner().invoke(verify.app, ["--max-tokens", "8", "--max-seq-len", "256", "--json"])
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


def test_a_model_without_experts_is_refused(tmp_path) -> None:
    from checkpoints import write_checkpoint

    path = write_checkpoint(tmp_path / "hf", "llama")
    with pytest.raises(ConfigError, match="no experts"):
        verify_model(replace(CONFIG, model_path=path, cache_dir=tmp_path / "cache"), ["x"], 2)


def test_it_is_a_command() -> None:
    assert COMMANDS["verify"][0] == "hybrid.verify"
