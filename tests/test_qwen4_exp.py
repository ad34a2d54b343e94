"""Qwen3.8: rows attend to pools that an indexer selects; a table of n-grams adds to gated streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS
from oracle import Oracle
from steps import error_of_changed, errors_together, in_chunks, open_engine, step

from hybrid.errors import ConfigError
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec
from hybrid.models.layers.base import Load
from hybrid.models.layers.block_selected import BlockSelectedAttention
from hybrid.models.layers.ngram import NgramDeltaNet

FAMILY = "qwen4_exp_text"
# Many heads, so that no score is that of a pool to which all are blind: among those the choice is free. No near-tie of
# experts decides.
LONG: dict[str, Any] = {"indexer_n_heads": 32, "num_experts_per_tok": 8, "initializer_range": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "pools of 4": {"indexer_budget": 64},
    "pools of 16, 4-grams, 4 streams": {
        **{"indexer_budget": 64, "indexer_compress_ratio": 16},
        **{"ngram_size": 4, "ple_embed_dim": 48, "hc_count": 4},
    },
}
WIDE = {"chunk_size": 256, "max_seq_len": 256}
LENGTH = 150
END = CONFIGS[FAMILY]["eos_token_id"]


def save(path: Path, case: str, seed: int = 0) -> Oracle:
    """A prompt in which several texts end, one after its first token."""
    saved = oracle.save(path, FAMILY, seed=seed, length=LENGTH, **{**LONG, **CASES[case]})
    saved.tokens[[0, 40, 42, 99]] = END
    return saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return save(tmp_path_factory.mktemp("pooled") / "hf", "pools of 4")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_nearer_to_fp32_than_transformers_in_bf16(tmp_path: Path, case: str) -> None:
    """Rounding may exchange pools of nearly equal scores, in either."""
    saved = [save(tmp_path / f"{seed}", case, seed) for seed in range(2)]
    ours, theirs = errors_together(saved, tmp_path / "cache", **WIDE)
    assert 0 < ours <= theirs


@pytest.mark.parametrize(
    "change",
    [
        {"indexer_budget": 256},
        {"eos_token_id": 6},
        {"seed": 1235},
        {"output_gate_type": "silu"},
    ],
    ids=str,
)
def test_a_slightly_wrong_model_is_further_off(tmp_path: Path, saved: Oracle, change: dict[str, Any]) -> None:
    right = error_of_changed(saved, tmp_path / "right", {}, **WIDE)
    assert error_of_changed(saved, tmp_path / "wrong", change, **WIDE) > 1.2 * right


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "fp8"])
def test_logits_are_the_same_bits_however_a_prompt_is_run(saved: Oracle, kv_format: str) -> None:
    """In chunks, beside others, from a snapshot in another sequence, on any threads."""
    tokens, cache = saved.tokens, saved.path.parent / "cache"
    with open_engine(saved.path, cache, kv_format=kv_format, **WIDE) as engine:
        whole = step(engine, (0, 0, tokens))
        for size in (1, 7, 64):
            engine.release(1)
            assert np.array_equal(whole, in_chunks(engine, tokens, size, slot=1)), size
        step(engine, (3, 0, tokens[::-1][:100]))
        together = step(engine, (3, 100, tokens[:1]), (2, 0, tokens[:90]))
        assert np.array_equal(whole[:90], together[1:])
        kept, state = engine.kv.save(2, 0, 96), engine.kv.snapshot(2)
        assert np.array_equal(whole[90:], step(engine, (2, 90, tokens[90:])))
        engine.release(1)
        engine.kv.load(kept, 1, 0, 96)
        engine.kv.restore(1, state)
        assert np.array_equal(whole[90:], step(engine, (1, 90, tokens[90:])))
    for threads in (1, 3):
        with open_engine(saved.path, cache, kv_format=kv_format, threads=threads, **WIDE) as engine:
            assert np.array_equal(whole, in_chunks(engine, tokens, 50))


def test_a_sequence_goes_back_within_a_run(saved: Oracle) -> None:
    """As guessed tokens need it: to any token of the run of eight that its newest one is in."""
    with open_engine(saved.path, saved.path.parent / "cache", **WIDE) as engine:
        whole = step(engine, (0, 0, saved.tokens))
        step(engine, (1, 0, saved.tokens[:97]))
        step(engine, (1, 97, saved.tokens[::-1][:7]))
        assert np.array_equal(whole[97:], step(engine, (1, 97, saved.tokens[97:])))


def test_memory_nodes_compute_it_together(saved: Oracle) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", numa="2", **WIDE) as engine:
        whole = step(engine, (0, 0, saved.tokens))
        assert np.array_equal(whole, in_chunks(engine, saved.tokens, 50, slot=1)) and np.isfinite(whole).all()


def test_every_instruction_set_computes_it(isa: str, saved: Oracle) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", isa=isa, **WIDE) as engine:
        assert engine.plan.isa == isa
        assert saved.error(step(engine, (0, 0, saved.tokens))) <= 1.5 * saved.bf16_error  # of one prompt, with its luck


@pytest.mark.parametrize("format", ["int8", "int4", "q4_k", "nvfp4"])
def test_matrices_of_every_kind_of_rows(tmp_path: Path, format: str) -> None:
    """In chunks the same bits; and near to bf16, as far as so few bits allow."""
    model, tokens = write_checkpoint(tmp_path / "hf", FAMILY), np.arange(60) * 7 % 131
    with open_engine(model, tmp_path / "cache") as engine:
        exact = step(engine, (0, 0, tokens))
    with open_engine(model, tmp_path / "cache", weight_format=format) as engine:
        whole = step(engine, (0, 0, tokens))
        assert np.array_equal(whole, in_chunks(engine, tokens, 1, slot=1))
    assert np.linalg.norm(whole - exact) < 0.9 * np.linalg.norm(exact)


def test_a_table_is_stored_row_by_row_and_counts_as_an_embedding(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", FAMILY)
    with open_engine(model, tmp_path / "cache", weight_format="int4") as engine:
        mixer = engine.spec.layers[0].mixer
        assert isinstance(mixer, NgramDeltaNet)
        tensors = {tensor.name: tensor for tensor in engine.spec.store_tensors(FormatMix.uniform("bf16"))}
        table = tensors["layers.0.ngrams.table"]
        assert (table.nbytes, table.part) == (mixer.ngrams.rows * 11 * 2, "embedding")
        plain = tensors["embedding"].nbytes + tensors["layers.3.ngrams.table"].nbytes
        assert engine.plan.weight_bytes["embedding"] == plain + table.nbytes
    from safetensors.numpy import load_file

    name = "model.layers.0.ple.ple_embedding.ngram_embedding.shard_{}.weight"
    pieces = load_file(model / "model.safetensors")
    (packed,) = (tmp_path / "cache").rglob("layer-00000*.safetensors")
    stored = load_file(packed)["layers.0.ngrams.table"]
    assert stored.tobytes() == b"".join(pieces[name.format(shard)].tobytes() for shard in range(3))


def test_in_short_sequences_rows_do_not_select() -> None:
    """Then nothing of an indexer is there; no device computes the streams either way."""
    spec = model_spec(CONFIGS[FAMILY])
    mixer = spec.layers[1].mixer
    assert isinstance(mixer, BlockSelectedAttention) and mixer.indexer.tokens == 35
    assert type(mixer.within(35)).__name__ == "GroupedQueryAttention" and mixer.within(36) is mixer


def test_no_device_computes_it(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", FAMILY, ple_layer_ids=[])
    for length, reason in ((64, "BlockSelectedAttention"), (32, "is several streams, which no device computes")):
        with pytest.raises(ConfigError, match=reason):
            open_engine(model, tmp_path / "cache", step_on="torch-cpu", max_seq_len=length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexer_kv_heads": 2}, "indexer_kv_heads is 2; it must be 1"),
        ({"indexer_n_heads": None}, "indexer_n_heads is missing"),
        ({"indexer_compress_ratio": 6, "indexer_budget": 36}, "indexer_compress_ratio is 6, indexer_budget 36"),
        ({"indexer_budget": 34}, "indexer_budget 34; the first must be a power of 2"),
        ({"indexer_head_dim": 10}, "indexer_head_dim is 10; it must be an integer from 12 to"),
        ({"indexer_head_dim": 21}, "indexer_head_dim is 21; it must be even"),
        ({"hc_count": 9}, "hc_count is 9; it must be an integer from 2 to 8"),
        ({"output_gate_type": "tanh"}, "output_gate_type is 'tanh'"),
        ({"ple_layer_ids": [2]}, r"ple_layer_ids is \[2\]; it must name layers from 1 to num_hidden_layers 4"),
        ({"ple_layer_ids": [5]}, r"ple_layer_ids is \[5\]"),
        ({"ple_embed_dim": 45}, "ple_embed_dim 45 is not a multiple of the 4 parts"),
        ({"ngram_size": 9}, "ngram_size is 9; it must be an integer from 2 to 8"),
        ({"ngram_vocab_size_base": 10**9}, "ngram_vocab_size_base is 1000000000; .*what the kernels count"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"eos_token_id": [131]}, "eos_token_id is 131; it must be an integer from 0 to 130"),
        ({"layer_types": ["sliding_attention"] * 4}, "a list of 4 of full_attention, linear_attention"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[FAMILY], **changes})


def test_words_of_either_configuration_mean_the_same() -> None:
    config = CONFIGS[FAMILY]
    kinds = ["indexed_attention" if kind == "full_attention" else kind for kind in config["layer_types"]]
    assert model_spec({**config, "layer_types": kinds, "eos_token_id": [5, 7]}) == model_spec(config)


def test_a_step_costs_what_it_reads_and_multiplies() -> None:
    """Of long sequences the keys of blocks, and no more tokens than are selected; of tables the rows of a token."""
    spec = model_spec(CONFIGS[FAMILY])
    place, mixer = spec.place(1, FormatMix.uniform("bf16")), spec.layers[1].mixer
    long, longer = (mixer.cost(place, Load(1, 1, tokens, float(tokens), "bf16")) for tokens in (1000, 2000))
    assert longer.bytes - long.bytes == 1000 / 4 * 32 * 2
    assert longer.flops - long.flops == 2 * 1000 / 4 * 3 * 20
    table = spec.layers[0].mixer
    assert isinstance(table, NgramDeltaNet)
    one, two = (table.ngrams.cost(spec.place(0, FormatMix.uniform("bf16")), Load(1, n, n, n, "bf16")) for n in (1, 2))
    assert two.bytes - one.bytes == 44 * 2
