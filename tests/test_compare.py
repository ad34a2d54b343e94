"""bench/compare.py measures two engines on the same weights, in turn, and says what it found."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_checkpoint
from typer.testing import CliRunner

from hybrid.commands import measure
from hybrid.errors import CapacityError, ConfigError, KernelError
from hybrid.machine import rates
from hybrid.serving.llm import LLM
from hybrid.weights.checkpoints.huggingface import Checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import compare
import comparison
import gguf_file
import pairs

EXTRA = "needs the extra [compare]"
SIZES: dict[str, Any] = {"mlp_only_layers": [], "moe_intermediate_size": 64, "head_dim": 32}
MATRICES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
NORMS = {
    "attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("compare") / "model", "qwen3_moe", **SIZES)


@pytest.fixture
def llama() -> ModuleType:
    pytest.importorskip("llama_cpp", reason=EXTRA)
    import llama_cpp_peer

    return llama_cpp_peer


# The file


def expected_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor that llama.cpp's qwen3moe reads, from the checkpoint's own names."""
    yield "token_embd", checkpoint.read("model.embed_tokens.weight")
    yield "output_norm", checkpoint.read("model.norm.weight")
    yield "output", checkpoint.read("lm_head.weight")
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        for name, source in (MATRICES | NORMS).items():
            yield f"blk.{layer}.{name}", checkpoint.read(f"{prefix}.{source}.weight")
        for name in ("gate", "up", "down"):
            experts = [checkpoint.read(f"{prefix}.mlp.experts.{e}.{name}_proj.weight") for e in range(10)]
            yield f"blk.{layer}.ffn_{name}_exps", np.stack(experts)


def test_a_bf16_file_holds_every_bit_of_the_checkpoint(model, tmp_path) -> None:
    from gguf import GGUFReader

    checkpoint, path = Checkpoint.open(model), tmp_path / "m.gguf"
    gguf_file.write_gguf(checkpoint, path, "BF16")
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    expected = dict(expected_tensors(checkpoint))
    assert set(found) == {f"{name}.weight" for name in expected}
    for name, values in expected.items():
        tensor = found[f"{name}.weight"]
        f32 = "norm" in name or name.endswith("ffn_gate_inp")
        assert tensor.tensor_type.name == ("F32" if f32 else "BF16")
        assert tuple(reversed(tensor.shape.tolist())) == values.shape
        wanted = values.astype(np.float32 if f32 else ml_dtypes.bfloat16)
        assert np.asarray(tensor.data).tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize(("type_name", "error"), [("Q8_0", 0.006), ("Q4_0", 0.12)])
def test_quantised_files_hold_the_checkpoint_nearly(model, tmp_path, type_name, error) -> None:
    from gguf import GGUFReader, quants

    checkpoint, path = Checkpoint.open(model), tmp_path / "m.gguf"
    gguf_file.write_gguf(checkpoint, path, type_name)
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, values in expected_tensors(checkpoint):
        tensor = found[f"{name}.weight"]
        matrix = "norm" not in name and not name.endswith("ffn_gate_inp")
        assert tensor.tensor_type.name == (type_name if matrix else "F32")
        wanted, held = values.astype(np.float32), quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.linalg.norm(held - wanted) <= (error if matrix else 0) * np.linalg.norm(wanted), name


def test_a_file_is_written_once(model, tmp_path) -> None:
    checkpoint = Checkpoint.open(model)
    path = gguf_file.cached_gguf(checkpoint, tmp_path, "BF16")
    written = path.stat().st_mtime_ns
    assert gguf_file.cached_gguf(checkpoint, tmp_path, "BF16") == path and path.stat().st_mtime_ns == written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("family", "changes", "type_name", "words"),
    [
        ("mixtral", {}, "BF16", "model_type 'mixtral'"),
        ("qwen3_moe", {}, "BF16", "its layers differ"),
        ("qwen3_moe", SIZES | {"norm_topk_prob": False}, "BF16", "norm_topk_prob"),
        ("qwen3_moe", SIZES | {"attention_bias": True}, "BF16", "biases"),
        ("qwen3_moe", SIZES | {"moe_intermediate_size": 40}, "Q8_0", "ffn_down_exps.weight has 40"),
    ],
    ids=["family", "dense layer", "router", "bias", "size"],
)
def test_a_model_that_would_not_be_the_same_is_refused(tmp_path, family, changes, type_name, words) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "m", family, **changes))
    with pytest.raises(ConfigError, match=words):
        gguf_file.write_gguf(checkpoint, tmp_path / "m.gguf", type_name)
    assert not (tmp_path / "m.gguf").exists()


# The peer


def test_llama_cpp_computes_the_same_logits(llama, model, tmp_path) -> None:
    """Its router, norms, rope and experts mean what ours mean: a wrong name or key would change everything."""
    tokens = np.random.default_rng(1).integers(0, 131, 40).tolist()
    file = gguf_file.cached_gguf(Checkpoint.open(model), tmp_path, "BF16")
    theirs = llama.LlamaCpp(file, 1, [measure.Test(0, 1, 0, 1)])
    try:
        found = theirs.logits(tokens[:20])
    finally:
        theirs.close()
    with LLM(model, cache_dir=tmp_path, threads=1) as llm:
        expected = llm.logits(tokens[:20])
        other = llm.logits(tokens[20:])
    assert relative_error(found, expected) < 0.01 < 0.5 < relative_error(other, expected)


def test_a_copied_context_is_that_of_a_real_prompt(llama, tmp_path, monkeypatch) -> None:
    """With one layer keys and values depend on token and position alone, so copies of a block are those of a prompt
    that repeats its tokens. 40 tokens are two and a half blocks.
    """
    model = write_checkpoint(tmp_path / "m", "qwen3_moe", **SIZES, num_hidden_layers=1)
    monkeypatch.setattr("llama_peer.STEP_ROWS", 16)
    theirs = llama.LlamaCpp(gguf_file.cached_gguf(Checkpoint.open(model), tmp_path, "BF16"), 1, [test := depth(40)])
    try:
        block = theirs.random_tokens(0, 16)
        theirs.prepare(test)
        found = theirs.decode_one(40, 7)
        theirs.prepare(depth(0))
        bare = theirs.decode_one(0, 7)
        expected = theirs.logits([*block, *block, *block[:8], 7])[-1]
    finally:
        theirs.close()
    assert relative_error(found, expected) < 0.005 < 0.05 < relative_error(bare, expected)


def depth(tokens: int) -> measure.Test:
    return measure.Test(0, 1, tokens, 1)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_build_without_the_instructions_of_the_machine_is_seen(llama, monkeypatch) -> None:
    monkeypatch.setattr(llama.api, "llama_print_system_info", lambda: b"CPU : AVX2 = 1 | AVX512 = 1 | FMA = 1 |")
    missing = llama.LlamaCpp.missing_instructions
    assert missing("avx2") == [] == missing("portable")
    assert missing("avx512_bf16") == ["AVX512_VNNI", "AVX512_BF16"]


@pytest.mark.parametrize("name", compare.GGUF_TYPES)
def test_a_comparison_from_end_to_end(llama, model, tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(rates, "PROBE_BYTES", rates._TOUCH_BYTES)
    monkeypatch.setattr(rates, "PROBE_ROUNDS", 10_000)
    result = run(
        ["--model-path", str(model), "--layers", "2", "--formats", name, "--tests", "pp9,tg2@20,tg2x3", "-r", "2"]
        + ["--threads", "1", "--peers", "llama.cpp", "--work-dir", str(tmp_path), "--output", "json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["machine"]["formats"][name]["layers"] == 2 and report["machine"]["threads"] == 1
    assert [(r["test"], r["depth"], r["batch"]) for r in report["results"]] == [
        ("pp9", 0, 1),
        ("tg2", 20, 1),
        ("tg2", 0, 3),
    ]
    for r in report["results"]:
        assert tuple(r) == comparison.COLUMNS and r["format"] == name
        assert r["peer"] == f"llama.cpp {compare.GGUF_TYPES[name]}"
        assert r["ratio"] == pytest.approx(r["ours"] / r["theirs"], rel=0.02, abs=0.001) and r["limit_share"] > 0


def test_both_open_a_gguf_file_as_it_is(llama, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rates, "PROBE_BYTES", rates._TOUCH_BYTES)
    monkeypatch.setattr(rates, "PROBE_ROUNDS", 10_000)
    file = gguf_file.cached_gguf(Checkpoint.open(model), tmp_path, "Q8_0", lambda *told: None)
    result = run(["--model-path", str(file), "--tests", "pp9", "-r", "1", "--threads", "1", "--output", "json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["machine"]["formats"]["gguf"]["format"].startswith("q8_0")
    assert [(r["test"], r["format"], r["peer"]) for r in report["results"]] == [("pp9", "gguf", "llama.cpp GGUF")]


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_the_moe_layers_compute_the_same(tmp_path, monkeypatch, format) -> None:
    pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
    import kt_kernel_peer

    tolerance = kt_kernel_peer.TOLERANCES[format]
    sizes = SIZES | {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 1}
    model = write_checkpoint(tmp_path / "m", "qwen3_moe", **sizes)
    ours = kt_kernel_peer.OurLayer(model, 1, tmp_path, 9, format)
    theirs = kt_kernel_peer.TheirLayer(Checkpoint.open(model), 1, 9, format)
    for rows in (1, 9):
        layer = kt_kernel_peer.Layer(ours.engine.spec, rows)
        ours.load(layer)
        theirs.load(layer)
        kt_kernel_peer._check_equal(ours, theirs, layer, tolerance)
    ours.load(layer)
    monkeypatch.setattr(ours, "output", lambda layer: 1.4 * theirs.output())
    with pytest.raises(KernelError, match="differ by 40.0% of the norm at 9 rows"):
        kt_kernel_peer._check_equal(ours, theirs, layer, tolerance)


# The models


def test_the_first_layers_of_a_checkpoint_are_a_checkpoint(model, tmp_path) -> None:
    view = pairs.first_layers(model, 2, tmp_path)
    assert pairs.first_layers(model, 2, tmp_path) == view and pairs.first_layers(model, 3, tmp_path) == model
    whole, part = Checkpoint.open(model), Checkpoint.open(view)
    part.check()
    assert len(part.spec.layers) == 2 and part.spec.layers == whole.spec.layers[:2]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert part.read(name).tobytes() == whole.read(name).tobytes()
    with pytest.raises(ConfigError, match="--layers 4 is more than the 3"):
        pairs.first_layers(model, 4, tmp_path)


def test_layers_are_left_out_where_two_copies_do_not_fit(model, monkeypatch) -> None:
    monkeypatch.setattr(pairs, "PROBE_BYTES", 0)
    monkeypatch.setattr(pairs, "BUFFERS", 0)
    checkpoint, tests = Checkpoint.open(model), [measure.Test(8, 0, 0, 1)]
    tensors = gguf_file.file_tensors(checkpoint, "BF16")
    layer = 2 * sum(tensor.nbytes for tensor in tensors if tensor.name.startswith("blk.0."))
    head, kv = 2 * 131 * 96 * 2, 2 * 8 * 2 * 2 * 32 * 2
    fit = [pairs.layers_that_fit(checkpoint, "BF16", tests, head + n * (layer + kv)) for n in (1, 2, 3, 4)]
    assert fit == [1, 2, 3, 3]
    assert pairs.layers_that_fit(checkpoint, "BF16", tests, head + 2 * (layer + kv) - 1) == 1
    with pytest.raises(CapacityError, match="one layer twice"):
        pairs.layers_that_fit(checkpoint, "BF16", tests, head)


# The measurement


class Dummy:
    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def prepare(self, test: measure.Test) -> None:
        self._log.append(f"{self._name} prepares {test.name}")

    def run(self, test: measure.Test) -> None:
        self._log.append(f"{self._name} runs {test.name}")

    def measure(self) -> None:
        self._log.append(self._name)


def test_engines_take_turns(monkeypatch) -> None:
    log: list[str] = []
    clock = iter(range(100))
    monkeypatch.setattr(comparison.time, "sleep", lambda seconds: log.append("rest"))
    monkeypatch.setattr(comparison.time, "perf_counter", lambda: float(next(clock)))
    tests = comparison.parse_tests("pp8,tg4")
    duels = comparison.duel(
        Dummy("ours", log), Dummy("theirs", log), tests, 2, Dummy("probe", log), lambda test: 0.5, lambda *_: None
    )
    a_round = [
        "rest",
        "ours prepares {0}",
        "probe",
        "ours runs {0}",
        "probe",
        "rest",
        "theirs prepares {0}",
        "theirs runs {0}",
    ]
    assert log == [line.format(name) for name in ("pp8", "tg4", "pp8", "tg4") for line in a_round]
    assert [(d.ours, d.theirs, d.limits, d.limit_share) for d in duels] == [([1, 1], [1, 1], [0.5, 0.5], 0.5)] * 2


def test_names_of_tests() -> None:
    found = comparison.parse_tests(comparison.TESTS)
    assert [(t.prompt, t.generate, t.depth, t.batch) for t in found] == [
        (128, 0, 0, 1), (512, 0, 0, 1), (2048, 0, 0, 1), (0, 32, 0, 1), (0, 32, 4096, 1), (0, 32, 16384, 1),
        (512, 0, 4096, 1), (0, 32, 0, 4), (0, 32, 0, 16),
    ]  # fmt: skip


# The report


def sample() -> dict[str, Any]:
    entry = comparison.Duel(measure.Test(0, 32, 4096, 2), [2.0, 1.0, 4.0], [4.0, 8.0, 16.0], [1.0, 0.9, 3.0])
    machine = {"cpu": "a CPU", "threads": 2, "isa": "avx2", "model": "qwen3_moe", "repetitions": 3, "notes": ["so, so"]}
    return {"machine": machine, "results": [comparison.result(entry, "int8", "llama.cpp Q8_0")]}


ROW = {
    "test": "tg32", "format": "int8", "depth": 4096, "batch": 2, "ours": 32.0, "peer": "llama.cpp Q8_0", "theirs": 8.0,
    "ratio": 4.0, "limit_share": 0.75,
}  # fmt: skip


def test_a_row_has_medians_in_tokens_a_second() -> None:
    assert sample()["results"] == [ROW]


def test_the_report_in_three_forms() -> None:
    assert json.loads(comparison.OUTPUTS["json"](sample())) == sample()
    (line,) = csv.DictReader(comparison.OUTPUTS["csv"](sample()).splitlines())
    assert line == {name: str(value) for name, value in ROW.items()}
    lines = comparison.OUTPUTS["md"](sample()).splitlines()
    assert lines[0] == "a CPU, 2 threads, avx2; qwen3_moe; medians of 3, tokens/s" and "- so, so" in lines
    assert lines[-1] == "| tg32 | int8 | 4096 | 2 | 32.00 | llama.cpp Q8_0 | 8.00 | 4.00x | 75.0% |"
    assert lines[-1].count("|") == lines[-2].count("|") == lines[-3].count("|")


# The command


def run(arguments: list[str]) -> Any:
    return CliRunner().invoke(compare.app, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tests", "pp"], ["'pp'", "tg32@4096"]),
        (["--tests", "tg32@4096x4"], ["tg32@4096x4", "depth 0"]),
        (["--tests", "tg0"], ["tg0", "at least 1"]),
        (["--formats", "bf16,int3"], ["int3", "bf16, int8, int4"]),
        (["--output", "xml"], ["xml", "md, csv, json"]),
        (["-r", "0"], ["--repetitions 0"]),
        (["--layers", "0"], ["--layers 0"]),
        (["--peers", "vllm"], ["vllm", "llama.cpp, ik_llama.cpp, transformers, kt-kernel"]),
        (["--peers", "transformers"], ["transformers", "llama.cpp in bf16"]),
        (["--peers", "llama.cpp,ik_llama.cpp"], ["ik_llama.cpp", "one at a time"]),
        (["--like", "gpt-oss-20b", "--formats", "int8"], ["--formats int8", "as it is"]),
        (["--like", "deepseek-v2-lite", "--layers", "4"], ["--layers 4", "27"]),
        (["--like", "gpt-2"], ["gpt-2", "qwen3-30b-a3b"]),
        (["--model-path", "/missing/model"], ["/missing/model"]),
        (["--model-path", "/missing/model.gguf"], ["/missing/model.gguf"]),
        (["--model-path", "model.gguf", "--formats", "int8"], ["--formats int8", "as it is"]),
        (["--model-path", "model.gguf", "--layers", "2"], ["--layers 2", "model.gguf"]),
        (
            ["--model-path", "model.gguf", "--peers", "kt-kernel"],
            ["kt-kernel does not go with", "llama.cpp, ik_llama.cpp"],
        ),
        (["--like", "gpt-oss-20b", "--peers", "llama.cpp,transformers"], ["transformers does not go with"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values_are_one_line_and_exit_code_2(monkeypatch, tmp_path, arguments, words) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda module: module)  # every package is there
    line = error_of(run([*arguments, "--work-dir", str(tmp_path)]))
    assert all(word in line for word in words), line


def test_a_missing_package_is_named_with_its_command(monkeypatch) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda module: None)
    line = error_of(run([]))
    assert "llama_cpp and gguf, not installed" in line and "pip install llama-cpp-python gguf" in line
    assert "pip install kt-kernel" in error_of(run(["--peers", "kt-kernel"]))


def test_other_peers_are_measured_where_they_are_installed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda module: None if module == "kt_kernel" else module)
    assert compare.find_peers(None) == ("llama.cpp", "transformers")
    assert "kt-kernel is not compared, it is not installed; pip install kt-kernel" in capsys.readouterr().err


def error_of(result: Any) -> str:
    """The one line of a command that was refused."""
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert line.startswith("error: ")
    return str(line)
