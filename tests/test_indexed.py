"""DeepSeek-V3.2 and GLM-5: in long sequences a row attends to the tokens that an indexer selects, and to no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from checkpoints import packed, random_tensors, write_checkpoint, write_tensors
from configs import CONFIGS
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf
from oracle import Oracle
from steps import error_of_changed, errors_together, in_chunks, open_engine, step
from test_gguf_models import packed as packed_file
from test_gguf_models import same_stores

from hybrid.config import EngineConfig
from hybrid.core import SamplingParams
from hybrid.errors import ConfigError, RequestError
from hybrid.formats.mix import FormatMix
from hybrid.models import deepseek, model_spec
from hybrid.models.layers.base import Load
from hybrid.models.layers.indexed import IndexedAttention
from hybrid.models.layers.indexer import Indexer
from hybrid.plan.resolve import plan_model
from hybrid.serving.llm import LLM

FAMILIES = ("deepseek_v32", "glm_moe_dsa")
# Many heads, so that no score is that of a token to which all are blind: among those the choice is free. No near-tie of
# experts decides.
LONG: dict[str, Any] = {"index_n_heads": 32, "initializer_range": 0.1, "num_experts_per_tok": 8, "n_group": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v32": ("deepseek_v32", {"index_topk": 16}),
    "deepseek_v32, biases, keys of other sizes": (
        "deepseek_v32",
        {"index_topk": 50, "index_head_dim": 34, "attention_bias": True, "rope_scaling": None},
    ),
    "glm_moe_dsa, the second layer sees what the first selected": ("glm_moe_dsa", {"index_topk": 16}),
    "glm_moe_dsa, named layers": (
        "glm_moe_dsa",
        {"index_topk": 40, "index_head_dim": 12, "indexer_types": ["full", "full", "shared"]},
    ),
    "glm5_next_text, pools of 4 tokens": ("glm5_next_text", {"index_topk": 16}),
    "glm5_next_text, pools of 16 tokens": ("glm5_next_text", {"index_topk": 48, "index_kpool": 16}),
}
WIDE = {"chunk_size": 128, "max_seq_len": 256}


def save(path: Path, case: str, seed: int = 0) -> Oracle:
    family, changes = CASES[case]
    return oracle.save(path, family, seed=seed, length=120, **LONG, **changes)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_nearer_to_fp32_than_transformers_in_bf16(tmp_path: Path, case: str) -> None:
    """Of rows that select, too: rounding may exchange tokens of nearly equal scores, in either."""
    saved = [save(tmp_path / f"{seed}", case, seed) for seed in range(3)]
    ours, theirs = errors_together(saved, tmp_path / "cache", **WIDE)
    assert 0 < ours <= theirs


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("deepseek_v32", {"index_topk": 17}),
        ("deepseek_v32", {"index_topk": 256}),
        ("glm5_next_text, pools of 4 tokens", {"index_topk": 20}),
        ("glm5_next_text, pools of 4 tokens", {"index_topk": 256}),
        ("glm_moe_dsa, named layers", {"index_topk": 44}),
        ("glm_moe_dsa, named layers", {"indexer_types": ["full", "shared", "shared"]}),
    ],
    ids=str,
)
def test_a_slightly_wrong_model_is_further_off(tmp_path: Path, case: str, change: dict[str, Any]) -> None:
    saved = save(tmp_path / "hf", case)
    right = error_of_changed(saved, tmp_path / "right", {}, **WIDE)
    assert error_of_changed(saved, tmp_path / "wrong", change, **WIDE) > 1.2 * right


def test_each_family_turns_the_dimensions_of_its_indexer_in_its_own_way(tmp_path: Path, monkeypatch: Any) -> None:
    for case in ("deepseek_v32", "glm_moe_dsa, the second layer sees what the first selected"):
        saved = save(tmp_path / case[:5], case)
        with open_engine(saved.path, tmp_path / "cache", **WIDE) as engine:
            right = saved.error(step(engine, (0, 0, saved.tokens)))
        with monkeypatch.context() as patched:
            patched.setattr(deepseek, "Indexer", lambda *sizes: Indexer(*sizes[:-1], not sizes[-1]))
            with open_engine(saved.path, tmp_path / "cache", **WIDE) as engine:
                assert saved.error(step(engine, (0, 0, saved.tokens))) > 1.5 * right


@pytest.fixture(scope="module", params=["bf16", "int8", "fp8"])
def kv_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[case for case in CASES if "named" in case or "biases" in case])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """As many tokens are selected as are seen, and less than half of all."""
    return save(tmp_path_factory.mktemp("indexed") / "hf", request.param)


def test_logits_are_the_same_bits_however_a_prompt_is_run(saved: Oracle, kv_format: str) -> None:
    """In chunks, beside others, behind a rewind, in a copied and in a saved and loaded sequence, on any threads."""
    tokens, cache = saved.tokens, saved.path.parent / "cache"
    with open_engine(saved.path, cache, kv_format=kv_format, **WIDE) as engine:
        whole = step(engine, (0, 0, tokens))
        for size in (1, 7, 64):
            assert np.array_equal(whole, in_chunks(engine, tokens, size, slot=1)), size
        step(engine, (1, 0, tokens[::-1][:100]))
        together = step(engine, (1, 100, tokens[:1]), (2, 0, tokens[:90]), (3, 0, tokens[:20]))
        assert np.array_equal(whole[:90], together[1:91])
        assert np.array_equal(whole[90:], step(engine, (2, 90, tokens[90:])))
        step(engine, (2, 60, tokens[::-1][:60]))
        assert np.array_equal(whole[60:], step(engine, (2, 60, tokens[60:])))
        engine.addresses.copy(0, 3, 96)
        assert np.array_equal(whole[96:], step(engine, (3, 96, tokens[96:])))
        kept = engine.addresses.kv.save(0, 0, 96)
        engine.release(1)
        engine.addresses.kv.load(kept, 1, 0, 80)
        assert np.array_equal(whole[80:], step(engine, (1, 80, tokens[80:])))
    for threads in (1, 3):
        with open_engine(saved.path, cache, kv_format=kv_format, threads=threads, **WIDE) as engine:
            assert np.array_equal(whole, in_chunks(engine, tokens, 50))


def test_memory_nodes_select_together(saved: Oracle) -> None:
    """Their sums are in another order, which may exchange tokens of nearly equal scores."""
    with open_engine(saved.path, saved.path.parent / "cache", numa="2", **WIDE) as engine:
        whole = step(engine, (0, 0, saved.tokens))
        assert np.array_equal(whole, in_chunks(engine, saved.tokens, 50, slot=1))
        assert saved.error(whole) <= 1.2 * saved.bf16_error  # of one prompt


def test_every_instruction_set_selects(isa: str, saved: Oracle) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", isa=isa, **WIDE) as engine:
        assert engine.plan.isa == isa
        assert (
            saved.error(step(engine, (0, 0, saved.tokens))) <= 1.2 * saved.bf16_error
        )  # of one prompt, which has luck


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "q4_k", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_every_kind_of_rows_select(tmp_path: Path, family: str, format: str) -> None:
    """In chunks the same bits; and finite."""
    path = write_checkpoint(tmp_path / "hf", family, index_topk=16)
    tokens = np.arange(60) * 7 % 131
    with open_engine(path, tmp_path / "cache", weight_format=format) as engine:
        whole = step(engine, (0, 0, tokens))
        assert np.isfinite(whole).all() and np.array_equal(whole, in_chunks(engine, tokens, 1, slot=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_up_to_as_many_tokens_as_are_selected_bits_are_those_of_attention_to_all(tmp_path: Path, family: str) -> None:
    """In an engine whose sequences may be longer, and in one whose sequences may not, where no indexer runs."""
    tensors = random_tensors({**CONFIGS[family], "index_topk": 40})
    tokens, found = np.arange(70) * 7 % 131, []
    for selects, longest in ((40, 256), (40, 40), (256, 256)):
        path = write_tensors(tmp_path / f"{selects}", {**CONFIGS[family], "index_topk": selects}, tensors)
        with open_engine(path, tmp_path / "cache", max_seq_len=longest) as engine:
            kinds = {op.kind for op in engine.plan.ops}
            assert ("select" in kinds) == (selects < longest)
            found.append((step(engine, (0, 0, tokens[:longest])), engine.plan.kv.token_bytes))
    (long, more), (short, some), (all_, least) = found
    assert np.array_equal(long[:40], short[:40]) and np.array_equal(short[:40], all_[:40])
    assert not np.array_equal(long[41:], all_[41:])
    indexers = 3 if family == "deepseek_v32" else 2
    assert some == least and more - some == indexers * 32 * 2  # keys of the indexers, padded, in bf16


@pytest.mark.parametrize("numa", ["off", "2"])
def test_indexers_that_do_not_run_are_not_copied(tmp_path: Path, numa: str) -> None:
    """A copy of the weights is what the plan counts, and what aligns its parts."""
    path, copied = write_checkpoint(tmp_path / "hf", "deepseek_v32", index_topk=16), []
    for longest in (16, 256):
        with open_engine(path, tmp_path / "cache", load="copy", numa=numa, max_seq_len=longest) as engine:
            assert np.isfinite(step(engine, (0, 0, np.arange(16)))[0]).all()
            copied.append(sum(node.bytes for node in engine.memory.nodes))
            indexers = engine.plan.weight_bytes.get("indexer", 0)
    assert copied[1] - copied[0] >= indexers > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_computes_as_many_tokens_as_are_selected(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "hf", family)
    config = EngineConfig(model_path=path, weight_format="bf16", step_on="torch-cpu", device="simulated")
    with pytest.raises(ConfigError, match=r"no device computes \(IndexedAttention\).* or a shorter --max-seq-len"):
        plan_model(config)
    assert plan_model(replace(config, max_seq_len=200)).device_ops


def test_text_is_produced_far_behind_the_tokens_that_are_selected(tmp_path: Path) -> None:
    """With shared prefixes, and more sequences than are kept at a time."""
    path = write_checkpoint(tmp_path / "hf", "glm_moe_dsa", index_topk=16)
    prompts = [[*range(1, 60), last] for last in (60, 61, 62)]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with LLM(path, threads=1, cache_dir=tmp_path / "cache", max_batch=2, batch_invariant=True) as llm:
        together = [answer.token_ids for answer in llm.generate(prompts, params)]
        assert together == [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert all(len(tokens) == 20 for tokens in together)


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_files_have_the_same_indexers(tmp_path: Path, family: str) -> None:
    """Layers without tensors of one see what the one before them selected; where no layer has any, none selects."""
    config = CONFIGS[family]
    tensors = random_tensors(config)
    plain = packed(write_tensors(tmp_path / "hf", config, tensors))
    metadata, named = gguf_metadata(config), gguf_tensors(config, tensors)
    file = packed_file(write_gguf(tmp_path / "model.gguf", metadata, named))
    with plain, file:
        assert same_stores(plain, file) and any(".indexer." in name for name in file.tensors)
        kinds = [bool(layer.mixer.indexer) for layer in file.spec.layers]  # type: ignore[attr-defined]
        assert kinds == [True, family == "deepseek_v32", True]
    none = {name: tensor for name, tensor in named.items() if ".indexer." not in name}
    with packed_file(write_gguf(tmp_path / "without.gguf", metadata, none)) as file:
        assert file.spec.max_position == 200


@pytest.mark.parametrize("index_topk", [256, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_indexers_that_never_select_are_not_read(tmp_path: Path, family: str, index_topk: int) -> None:
    """From neither kind of file."""
    config = {**CONFIGS[family], "index_topk": index_topk}
    tensors = random_tensors(config)
    more = {name: values for name, values in random_tensors(CONFIGS[family]).items() if ".indexer." in name}
    assert more and not any(".indexer." in name for name in tensors)
    plain = packed(write_tensors(tmp_path / "plain", config, tensors))
    found = packed(write_tensors(tmp_path / "hf", config, {**tensors, **more}))
    metadata, named = gguf_metadata(config), gguf_tensors(config, {**tensors, **more})
    file = packed_file(write_gguf(tmp_path / "model.gguf", metadata, named))
    with plain, found, file:
        assert same_stores(plain, found) and same_stores(plain, file)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"index_topk_pattern": None}, "FFF"),
        ({"index_topk_pattern": "FSS"}, "FSS"),
        ({"index_topk_pattern": ["full", "full", "shared", "full"]}, "FFS"),  # the last predicts a further token
        ({"index_topk_pattern": "FSSF", "indexer_types": ["full", "shared", "full"]}, "FSF"),
        ({"index_topk_pattern": None, "index_topk_freq": 2}, "FFS"),
        ({"index_topk_pattern": None, "index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSF"),
    ],
    ids=str,
)
def test_layers_that_share_are_told_as_transformers_tells_them(changes: dict[str, Any], wanted: str) -> None:
    spec = model_spec({**CONFIGS["glm_moe_dsa"], **changes})
    assert "".join("FS"[not layer.mixer.indexer] for layer in spec.layers) == wanted  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", [None, False, True])
def test_config_json_may_say_how_an_indexer_turns(family: str, said: bool | None) -> None:
    spec = model_spec({**CONFIGS[family], "indexer_rope_interleave": said})
    wanted = family == "glm_moe_dsa" if said is None else said
    assert spec.layers[0].mixer.indexer.interleaved == wanted  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v32", {"rope_interleave": False}, "rope_interleave is False; it must be absent or True"),
        ("glm_moe_dsa", {"index_topk": 0}, "index_topk is 0"),
        ("glm_moe_dsa", {"index_head_dim": 10}, "index_head_dim is 10; it must be an integer from 12 to 1024"),
        ("glm_moe_dsa", {"index_head_dim": 21}, "index_head_dim is 21; it must be even"),
        ("glm_moe_dsa", {"index_n_heads": 257}, "index_n_heads is 257; it must be an integer from 1 to 256"),
        ("glm_moe_dsa", {"mlp_layer_types": ["dense"]}, "a list of 3 of dense, sparse"),
        ("glm_moe_dsa", {"index_topk_pattern": "FSX"}, "a list of 3 of full, shared"),
        ("glm_moe_dsa", {"index_topk_pattern": "SFF"}, "index_topk_pattern says shared of the first layer"),
        ("glm_moe_dsa", {"indexer_types": ["full"]}, "a list of 3 of full, shared"),
    ],
)
def test_what_is_not_computed_is_refused(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[family], **changes})


@pytest.mark.parametrize(("length", "advice"), [(199, "or raise max_seq_len"), (256, "to the model's 256 positions")])
def test_a_prompt_that_is_too_long_is_told_what_can_be_done(tmp_path: Path, length: int, advice: str) -> None:
    path = write_checkpoint(tmp_path / "hf", "glm_moe_dsa")
    with LLM(path, max_seq_len=length, threads=1, cache_dir=tmp_path / "cache") as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()
        with pytest.raises(RequestError, match=f"the prompt has 257 tokens, .* may have {length} here: .*{advice}"):
            llm.logits([1] * 257)


def test_a_step_costs_what_it_reads_and_multiplies() -> None:
    """Of long sequences the keys of indexers, and of the rows of attention those that are selected."""
    spec = model_spec(CONFIGS["deepseek_v32"])
    place, mixer = spec.place(0, FormatMix.uniform("bf16")), spec.layers[0].mixer
    assert isinstance(mixer, IndexedAttention)
    plain, cost = mixer.within(200), lambda load: mixer.cost(place, load)
    short, long, longer = (Load(1, 1, tokens, float(tokens), "bf16") for tokens in (200, 1000, 2000))
    added = cost(long).bytes - cost(short).bytes
    assert added == 1000 * 32 * 2  # keys of the indexer: rows of attention are as many as before
    assert cost(longer).bytes - cost(long).bytes == 1000 * 32 * 2
    assert cost(longer).flops - cost(long).flops == 2 * 1000 * 3 * 20
    assert cost(short).bytes > plain.cost(place, short).bytes  # matrices of the indexer
