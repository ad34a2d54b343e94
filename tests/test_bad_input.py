"""Bad input through the real commands: one line on stderr, nothing on stdout, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import packed, write_checkpoint
from configs import CONFIGS
from steps import open_engine

from hybrid import LLM, EngineConfig, SamplingParams
from hybrid.commands.bench import check_lengths, make_tests, parse_counts
from hybrid.config import MAX_THREADS, check_config
from hybrid.errors import ConfigError, KernelError, WeightsError
from hybrid.machine.hardware import default_threads
from hybrid.serving.scheduler import StepRecord
from hybrid.text.chat_template import load_template
from hybrid.text.tokenizer import load_tokenizer, read_eos_ids
from hybrid.weights.pack import cached_store, model_config

ROOT = Path(__file__).parent.parent
RUN, BENCH = ("-m", "hybrid.main"), ("-m", "hybrid.cli", "bench")
PACK, CLI = ("weights_preprocessor.py",), ("-m", "hybrid.cli")


def command(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, **options}
    return subprocess.run(line, cwd=ROOT, timeout=600, check=False, **options)


def refused(*arguments: object, **options) -> str:
    result = command(*arguments, **options)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*RUN, "--threads", "abc"), ["--threads", "'abc'", "whole number"]),
        ((*RUN, "--temperature", "warm"), ["--temperature", "'warm'", "number"]),
        ((*RUN, "--model-path="), ["--model-path", "empty"]),
        ((*RUN, "--model-path=~nobody-of-this-name/model"), ["home directory"]),
        ((*RUN, "--frobnicate"), ["--frobnicate", "--help"]),
        ((*RUN, "prompt"), ["prompt", "--help"]),
        ((*CLI, "run", "--prompt"), ["--prompt", "hybrid run --help"]),
        ((*BENCH, "--repetitions", "x"), ["--repetitions", "'x'"]),
        ((*BENCH, "--prompt", "99999"), ["pp99999", "2048"]),
        ((*BENCH, "--format", "int4;head=int8"), ["'int4;head=int8'", "bf16, int8, int4, fp8, mxfp4"]),
        ((*RUN, "--format", "head=int8,head=int4"), ["'head=int4'", "once"]),
        ((*RUN, "--kv-format", "q8"), ["--kv-format", "'q8'", "bf16, int8, fp8"]),
        (PACK, ["--input-path"]),
        ((*PACK, "--input-path", "/missing", "--output-path="), ["--output-path", "empty"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_command_line_that_is_wrong_is_one_line(arguments: tuple[str, ...], words: list[str]) -> None:
    line = refused(*arguments)
    assert all(word in line for word in words), line


def test_a_model_that_cannot_fit_is_refused_by_its_configuration_alone(tmp_path: Path) -> None:
    huge = {"hidden_size": 16384, "num_hidden_layers": 200, "num_experts": 256, "moe_intermediate_size": 8192}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["qwen3_moe"], **huge, "mlp_only_layers": []}))
    line = refused(*RUN, "--model-path", tmp_path, "--prompt", "x")
    assert "does not fit" in line and line.count(" GB") >= 3
    table = command(*RUN, "--model-path", tmp_path, "--dry-run")
    assert table.returncode == 2 and "weights: experts" in table.stdout and table.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_plan_for_programs_is_json() -> None:
    result = command(*RUN, "--dry-run", "--json")
    assert json.loads(result.stdout)["problem"] is None and result.stderr == ""


def test_a_cache_that_cannot_be_written_names_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused(*RUN, "--prompt", "x", "--cache-dir", tmp_path / "file")
    assert "--cache-dir" in line and str(tmp_path / "file") in line


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(redirection: str) -> None:
    line = f'"$0" -m hybrid.main --prompt Once --max-tokens 2 {redirection}'
    result = subprocess.run(["sh", "-c", line, sys.executable], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert result.stdout == ("" if ">&-" in redirection.split() else " upon a\n"[: len(result.stdout)])


def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = command(*CLI, "--help", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "No space left" in result.stderr


def test_a_reader_of_the_help_may_leave() -> None:
    process = subprocess.Popen([sys.executable, *CLI], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(600)) == (b"", 141)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": MAX_THREADS + 1},
        {"threads": "4"},
        {"threads": np.int64(4)},
        {"threads": True},
        {"max_batch": None},
        {"chunk_size": 2.0},
        {"kv_format": "int4"},
        {"kv_format": None},
        {"batch_invariant": 1},
        {"batch_invariant": "no"},
    ],
    ids=str,
)
def test_engine_options_are_of_their_type_and_in_range(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(options)).replace('_', '-')} "):
        check_config(EngineConfig(**options))  # type: ignore[arg-type]


def test_a_format_is_a_text() -> None:
    with pytest.raises(ConfigError, match="--format 8 is not a text"):
        check_config(EngineConfig(weight_format=8))  # type: ignore[arg-type]


def test_the_environment_cannot_ask_for_a_million_threads() -> None:
    with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS is '1000000'.*{MAX_THREADS}"):
        default_threads(2, None, "1000000")


def test_bench_speaks_of_its_own_flags() -> None:
    with pytest.raises(ConfigError, match="--depth '²' is not a list of counts"):
        parse_counts("²", "--depth")
    with pytest.raises(ConfigError, match="tg8 at depth 2040 .* 2049 .* 2048.*--depth"):
        check_lengths(EngineConfig(), make_tests([0], [8], [2040], [1]))
    check_lengths(EngineConfig(), make_tests([0], [8], [2039], [1]))


def test_a_store_is_planned_by_what_it_was_packed_from(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    store = packed(source).path
    (store / "config.json").write_text(json.dumps({**CONFIGS["qwen3_moe"], "hidden_size": 48}))
    assert model_config(store)["hidden_size"] == 96
    with LLM(store) as changed, LLM(source, cache_dir=tmp_path / "cache") as whole:
        assert (changed.logits([1, 2, 3]) == whole.logits([1, 2, 3])).all()


def test_a_store_that_was_not_finished_says_so_in_a_dry_run_too(tmp_path: Path) -> None:
    store = packed(write_checkpoint(tmp_path / "hf", "llama")).path
    (store / "manifest.json").rename(store / "packing.json")
    (store / "config.json").unlink()
    for what in ("--dry-run", "--hide-resp"):
        assert "not finished" in refused(*RUN, "--model-path", store, "--prompt", "x", what)
    with pytest.raises(WeightsError, match="not finished"):
        cached_store(store)


def test_damaged_tokenizer_files_are_named_or_passed_over(tmp_path: Path) -> None:
    odd = {"bos_token": 5, "eos_token": {"x": 1}, "chat_template": [1, {"name": "default"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    assert load_template(tmp_path) is None and read_eos_ids(tmp_path, None) == frozenset()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template.jinja cannot be read"):
        load_template(tmp_path)


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "model", "llama")
    monkeypatch.setenv("HOME", str(tmp_path))
    with LLM("~/model", cache_dir="~/cache") as llm:
        assert llm.logits([1]).shape == (1, 131)
    assert list((tmp_path / "cache").iterdir())


def test_a_fork_does_not_hang_but_says_that_threads_are_gone() -> None:
    with LLM(threads=2) as llm:
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                llm.generate([5], SamplingParams(max_tokens=2))
            except KernelError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        assert b"fork" in os.read(read, 1000)
        os.waitpid(child, 0)
        assert llm.generate([5], SamplingParams(max_tokens=2))[0].token_ids


def test_the_parts_of_a_step_make_its_total() -> None:
    records: list[StepRecord] = []
    with LLM() as llm:
        llm.observe(records.append)
        llm.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(records) == 3
    for times in (record.times for record in records):
        parts = times.attention + times.moe + times.head + times.other + times.sampling
        assert parts == pytest.approx(times.total) and min(times.attention, times.moe, times.other) > 0


def test_code_beside_a_model_is_never_run(tmp_path: Path) -> None:
    """Whatever its configurations say of it."""
    said = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Slow", None]}
    path, marker = write_checkpoint(tmp_path / "model", "mixtral", auto_map=said), tmp_path / "was run"
    for name in (
        "evil",
        "__init__",
        "configuration_mixtral",
        "modeling_mixtral",
        "tokenization_mixtral",
        "sitecustomize",
    ):
        (path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    shutil.copy(ROOT / "hybrid" / "assets" / "tiny_moe" / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_text(json.dumps({"auto_map": said, "tokenizer_class": "evil.Slow"}))
    with open_engine(path, tmp_path / "cache") as engine:
        assert engine.spec.model_type == "mixtral" and load_tokenizer(path).encode("a")
    assert not marker.exists()
