"""`hybrid fit`: sizes are exact, speeds those that were measured, and any machine can be described."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS as SMALL
from test_plan import MACHINE

from hybrid.commands.fit import FitOptions, fits_of, fitter_of, instead_of, machine_of
from hybrid.commands.fit_text import text
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.formats.mix import MIXES, parse_mix
from hybrid.machine.rates import Rates
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.plan.fit import Fit, fit_model, parameters
from hybrid.weights.checkpoints.published import native_mix
from hybrid.weights.pack import cached_store

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from synthetic_checkpoint import CONFIGS, make_slice  # noqa: E402

QWEN3_235B = {
    **CONFIGS["qwen3-30b-a3b"],
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536,
}  # fmt: skip
QWEN3_CODER_480B = {
    **CONFIGS["qwen3-30b-a3b"],
    "hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96, "num_key_value_heads": 8,
    "num_experts": 160, "moe_intermediate_size": 2560, "intermediate_size": 8192, "max_position_embeddings": 262144,
}  # fmt: skip
GPT_OSS_120B = {**CONFIGS["gpt-oss-20b"], "num_hidden_layers": 36, "num_local_experts": 128}
MIXTRAL_8X22B = {
    **CONFIGS["mixtral-8x7b"],
    "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48,
    "max_position_embeddings": 65536,
}  # fmt: skip


def fit(spec: ModelSpec, name: str = "int4", rates: Rates | None = None, depth: int = 0, **config: Any) -> Fit:
    return fit_model(spec, name, MIXES[name], MACHINE, rates or Rates(80e9), EngineConfig(**config), depth)


@pytest.mark.parametrize(
    "config, count",
    [
        # total_size in the published indexes, divided by two bytes
        (CONFIGS["qwen3-30b-a3b"], 30_532_122_624),
        (CONFIGS["mixtral-8x7b"], 46_702_792_704),
        (QWEN3_235B, 235_093_634_560),
        (CONFIGS["gpt-oss-20b"], 20_914_757_184),
        (CONFIGS["deepseek-v2-lite"], 15_706_484_224),
        (CONFIGS["deepseek-r1"], 671_026_419_200),  # without the layer that predicts a further token
        (CONFIGS["qwen3-next-80b-a3b"], 79_674_391_296),  # likewise
        (QWEN3_CODER_480B, 480_154_875_392),
        (GPT_OSS_120B, 116_829_156_672),
        (MIXTRAL_8X22B, 140_620_634_112),
        (CONFIGS["phi-3.5-moe"], 41_873_153_344),
    ],
    ids=lambda given: f"{given['model_type']}" if isinstance(given, dict) else "",
)
def test_parameters_are_those_of_the_published_model(config, count) -> None:
    assert parameters(model_spec(config))[0] == count


def test_a_token_uses_its_experts_alone() -> None:
    """3.3 billion by the model card, of which 0.3 are the embedding, which is looked up."""
    assert parameters(model_spec(CONFIGS["qwen3-30b-a3b"]))[1] == pytest.approx(3.04e9, rel=0.01)


def test_latents_are_kept_once_and_published_fp8_is_counted_as_it_is() -> None:
    """By hand: 576 values a layer; in fp8 a byte a parameter, and two in the embedding and the matrices of heads."""
    config = CONFIGS["deepseek-r1"]
    spec, mix = model_spec(config), native_mix(config)
    found = fit_model(spec, "fp8", mix, MACHINE, Rates(80e9), EngineConfig(max_seq_len=4096), 0)
    assert found.plan.kv.token_bytes == 61 * 576 * 2
    assert found.weights == pytest.approx(671.03e9 + 129_280 * 7168 + 61 * 128 * 256 * 512, rel=0.01)


@pytest.mark.parametrize("family", SMALL)
def test_sizes_are_those_of_the_packed_store(tmp_path, family) -> None:
    source = write_checkpoint(tmp_path / "hf", family)
    with cached_store(source, tmp_path / "cache", "int8") as store:
        assert fit(model_spec(SMALL[family]), "int8").weights == store.nbytes


@pytest.mark.parametrize(
    "results, format, read, peaks",
    [
        ("2026-11-21-qwen3-30b-a3b-8-layers.json", "bf16", 45.01e9, (1004.5e9, 0.0)),
        ("2026-11-21-compare-int8-again.json", "int8", 60e9, (1000e9, 2000e9)),
        ("2026-11-21-compare-int4.json", "int4", 60e9, (1000e9, 2000e9)),
    ],
)
def test_predicted_shares_of_the_limit_are_those_of_recorded_runs(results, format, read, peaks) -> None:
    """Within 15 %. Speeds scale with the machine; the share of its limit is what a run says of this runtime."""
    rates = Rates(read, *peaks)
    spec = model_spec({**CONFIGS["qwen3-30b-a3b"], "num_hidden_layers": 8})
    compared = 0
    for result in json.loads((ROOT / "bench/results" / results).read_text())["results"]:
        if result["test"] not in ("pp512", "tg32") or result["batch"] > 1 or result["depth"] > 4096:
            continue
        found = fit(spec, format, rates, result["depth"])
        cost, speed, tokens = (
            (found.prompt, found.prompt_speed, 512)
            if result["test"] == "pp512"
            else (found.decode, found.decode_speed, 1)
        )
        assert speed is not None
        share = rates.seconds(cost) * speed / tokens
        assert share == pytest.approx(result["limit_share"], rel=0.15), result
        compared += 1
    assert compared >= 2


def recorded_slices() -> list[Any]:
    """Of gpt-oss as published, the runs since its format is multiplied as integers."""
    results = ROOT / "bench/results"
    rows = [
        (report["machine"], row)
        for report in json.loads((results / "2026-11-29-slices.json").read_text())
        for row in report["results"]
        if (row["model"], row["format"]) != ("gpt-oss-20b", "auto")
    ]
    rows += [
        (report["machine"], row | {"model": "gpt-oss-20b", "format": "auto"})
        for report in json.loads((results / "2026-11-29-mxfp4.json").read_text())["slice"]
        for row in report["results"]
        if report["machine"]["isa"] == "avx512_bf16"
    ]
    named = ("model", "format", "test")
    return [pytest.param(*row, id="-".join([str(n), *(row[1][key] for key in named)])) for n, row in enumerate(rows)]


@pytest.mark.parametrize(("machine", "row"), recorded_slices())
def test_predictions_are_those_of_recorded_slices(machine, row) -> None:
    """Within 15 % of the share of the limit that was reached."""
    config = make_slice(row["model"])
    spec, mix = model_spec(config), parse_mix(row["format"], native_mix(config))
    peaks = [1e9 * machine["peak_gflops"].get(kind, 0.0) for kind in ("bf16", "int8")]
    rates, depth = Rates(1e9 * machine["read_gbps"], *peaks), 0 if row["test"] == "pp512" else 16
    found = fit_model(spec, row["format"], mix, MACHINE, rates, EngineConfig(), depth)
    if row["test"] == "pp512":
        assert found.prompt_speed and found.prompt_limit
        share = found.prompt_speed / found.prompt_limit
    else:
        share = found.decode_speed / found.decode_limit
    assert share == pytest.approx(row["limit_share"], rel=0.15)


def test_prompts_are_not_predicted_for_a_machine_whose_operations_are_unknown() -> None:
    found = fit(model_spec(SMALL["qwen3_moe"]))
    assert found.prompt_speed is None and found.decode_speed > 0


def test_a_model_that_does_not_fit_is_described() -> None:
    spec = model_spec(CONFIGS["mixtral-8x7b"])
    small = replace(MACHINE, memory_available=16 << 30)
    found = fit_model(spec, "int4", MIXES["int4"], small, Rates(80e9), EngineConfig())
    assert found.plan.problem and found.needed > 26e9
    assert json.dumps(found.to_dict())


def test_a_gpu_gets_the_experts_that_fit() -> None:
    spec = model_spec(CONFIGS["gpt-oss-20b"])
    config = EngineConfig(device="cuda")
    found = fit_model(spec, "int4", MIXES["int4"], replace(MACHINE, device_memory=12 << 30), Rates(80e9), config)
    assert found.plan.cache and 0 < found.plan.cache.geometry.slots < 768
    assert found.to_dict()["cache"]["slots"] == found.plan.cache.geometry.slots


def test_a_gpu_mirrors_a_row_a_token_of_latents() -> None:
    """61 layers of 576 bf16 values, whatever the number of heads and the format at home."""
    spec, big = model_spec(CONFIGS["deepseek-r1"]), replace(MACHINE, memory_available=10**12, device_memory=80 * 10**9)
    for kv_format in ("bf16", "fp8"):
        config = EngineConfig(device="cuda", max_batch=4, kv_format=kv_format)
        found = fit_model(spec, "fp8", MIXES["fp8"], big, Rates(80e9), config)
        device = found.plan.device
        assert device and device.kv == device.kv_tokens * 4 * 61 * 576 * 2
        assert 34.4e9 < device.weights < 34.5e9 and device.left >= 0
        assert found.to_dict()["gpu"]["kv"] == device.kv and not found.without_gpu


def test_what_a_gpu_cannot_have_fits_the_cpu_all_the_same() -> None:
    spec, machine = (
        model_spec(CONFIGS["deepseek-r1"]),
        replace(MACHINE, memory_available=10**12, device_memory=24 * 10**9),
    )
    found = fit_model(spec, "fp8", MIXES["fp8"], machine, Rates(80e9), EngineConfig(device="cuda"))
    assert found.without_gpu.startswith("the device has 24.00 GB free; weights take 34.4")
    assert found.plan.device is None and found.plan.cache is None and not found.plan.problem
    with pytest.raises(ConfigError, match="--max-seq-len|max_seq_len"):
        fit_model(spec, "fp8", MIXES["fp8"], machine, Rates(80e9), EngineConfig(device="cuda", max_seq_len=10**9))


@pytest.mark.parametrize(
    ("gpu", "words"),
    [("24GB", "On the GPU, bf16: 0.38 MB of weights"), ("1MB", "Not on the GPU, bf16: the device has 1.00 MB free")],
)
def test_the_command_says_what_lies_on_a_gpu(tmp_path, gpu, words) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL["gemma3_text"]))
    machine = ("--memory", "32GB", "--bandwidth", "80GB/s", "--gpu", gpu, "--format", "bf16")
    assert words in run_fit(str(path), *machine).stdout


@pytest.mark.parametrize(
    "text, size",
    [("64GB", 64e9), ("512 GiB", 512 << 30), ("80GB/s", 80e9), ("1.5tb", 1.5e12), ("100", 100), ("2K", 2e3)],
)
def test_sizes_are_read_with_their_units(text, size) -> None:
    from hybrid.commands.fit import parse_size

    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "1e5", "nan", "64XB", "1" * 400])
def test_what_is_no_size_is_refused(text) -> None:
    from hybrid.commands.fit import parse_size

    with pytest.raises(ConfigError, match="--memory .* is not a size; write a number above 0 and a unit"):
        parse_size(text, "--memory")


@pytest.mark.parametrize("flag", ["memory", "bandwidth", "gpu"])
def test_a_size_without_its_unit_is_refused(flag) -> None:
    sizes = {"memory": "64GB", "bandwidth": "80GB/s", flag: "64"}
    with pytest.raises(ConfigError, match=f"--{flag} '64' is less than 1 MB; write a number with its unit"):
        machine_of(FitOptions(**sizes))


def run_fit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hybrid.cli", "fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_command_reads_a_configuration_alone(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["qwen3-30b-a3b"]))
    machine = ("--memory", "32GB", "--bandwidth", "80GB/s", "--tflops", "1", "--gpu", "24GB")
    lines = run_fit(str(path), *machine).stdout.splitlines()
    assert lines[0] == "model: qwen3_moe, 48 layers, 30.53 billion parameters, 3.04 billion for a token"
    rows = {line.split()[0]: line for line in lines if line.split()[:1] in (["auto"], ["int8"], ["int4"])}
    assert " no " in rows["auto"] and " yes " in rows["int4"]
    assert "Take --format int4: the first that fits with 32768 tokens of context." in lines
    assert any(line.startswith("On the GPU, int4: 3.11 GB of weights") and "; 48 indexes of " in line for line in lines)
    report = json.loads(run_fit(str(path), *machine, "--json", "--format", "int4,head=int8").stdout)
    assert [entry["name"] for entry in report["formats"]] == ["int4,head=int8"]
    assert report["model"]["parameters"] == 30_532_122_624
    assert report["machine"]["gpu_bytes"] == 24e9


@pytest.mark.parametrize(
    ("like", "memory", "formats", "length", "words"),
    [
        ("qwen3-30b-a3b", "32GB", ("bf16",), None, "bf16 does not fit, but --format int8,experts=int4 does: it needs"),
        ("qwen3-30b-a3b", "16GB", ("bf16",), None, "bf16 does not fit: int4, which takes least, needs 21.27 GB, 5.27"),
        ("qwen3-30b-a3b", "40GB", (), 40960, "Take --format int8: the first that fits with 40960 tokens of context."),
        ("deepseek-r1", "64GB", (), None, "None of these fits: mxfp4, which takes least, needs 381.35 GB"),
    ],
)
def test_what_fits_instead_is_told(like, memory, formats, length, words) -> None:
    options = FitOptions(memory=memory, bandwidth="80GB/s", format=formats)
    assert words in shown(CONFIGS[like], options, max_seq_len=length)


def test_a_context_that_would_fit_is_told() -> None:
    """By hand: 2 GB more than weights and buffers hold 20,345 tokens of 98,304 bytes, in blocks of 256 20,224."""
    spec = model_spec(CONFIGS["qwen3-30b-a3b"])
    fixed = fit(spec, "int4", max_seq_len=40960).plan.fixed_bytes
    options = FitOptions(memory=str(fixed + 2 * 10**9), bandwidth="80GB/s", format=("int4",))
    assert "; int4 with --max-seq-len 20224 fits." in shown(CONFIGS["qwen3-30b-a3b"], options, max_seq_len=40960)


def shown(config: dict[str, Any], options: FitOptions, **settings: Any) -> str:
    """What `hybrid fit` prints of a config.json, with the threads and the instruction set of MACHINE."""
    spec, native = model_spec(config), native_mix(config)
    described, rates = machine_of(options)
    kept = ("memory_total", "memory_available", "device_memory")
    hardware = replace(MACHINE, **{name: getattr(described, name) for name in kept})
    fitter = fitter_of(spec, hardware, rates, EngineConfig(numa="off", **settings), options.depth)
    found = fits_of(fitter, native, options.format)
    return text(spec, hardware, rates, found, instead_of(fitter, found))


def test_bytes_are_told_by_part_and_a_gpu_by_its_flags() -> None:
    """By hand: 48 layers of 128 experts of 3 x 768 x 2048; attention of 2048 x (4096 + 1024) + 4096 x 2048."""
    options = FitOptions(memory="64GB", bandwidth="80GB/s", gpu="24GB", format=("bf16",))
    lines = shown(CONFIGS["qwen3-30b-a3b"], options)
    assert "bf16: experts 57.98 GB in bf16, attention 1.81 GB in bf16, embedding 0.62 GB in bf16, head 0.62 GB" in lines
    assert re.search(r"48 indexes of (\d+) slots .*: --cache-nblocks 48 --cache-nways \1\.", lines)


def test_the_command_measures_the_machine_that_it_runs_on() -> None:
    rates = json.loads(run_fit(str(ROOT / "hybrid/assets/tiny_moe"), "--json").stdout)["machine"]
    assert min(rates["read"], rates["flops"], rates["int_ops"]) > 0


def test_the_command_names_what_is_wrong(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    for path, message in (
        (tmp_path / "config.json", "model_type 'unheard_of' is not supported"),
        (tmp_path / "missing", "no such directory"),
        (ROOT / "hybrid/assets/tiny_moe", "--depth 999999 must be below the model's"),
    ):
        result = run_fit(str(path), "--bandwidth", "1GB", "--depth", "999999")
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
