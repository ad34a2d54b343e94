"""One source of settings: each is declared once, and reaches flags, environment, checks and `LLM` from there."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hybrid import LLM, CacheConfig, EngineConfig, SamplingParams
from hybrid.cli import COMMANDS
from hybrid.cluster.config import ClusterConfig
from hybrid.commands import bench, chat, fit, models, pack, perplexity, run, serve, simulate, verify
from hybrid.commands.bench import BenchOptions
from hybrid.commands.chat import ChatOptions
from hybrid.commands.fit import FitOptions
from hybrid.commands.flags import command, new_app, only
from hybrid.commands.form import FormOptions
from hybrid.commands.models import ModelsOptions
from hybrid.commands.pack import PackOptions
from hybrid.commands.perplexity import PerplexityOptions
from hybrid.commands.run import RunOptions
from hybrid.commands.simulate import SimulateOptions
from hybrid.commands.verify import VerifyOptions
from hybrid.config import DeviceConfig, check_config
from hybrid.errors import ConfigError
from hybrid.server.config import ServerConfig
from hybrid.serving.arguments import configure
from hybrid.serving.params import check_params
from hybrid.settings import Setting, build, check_settings, choose, named_as_given, settings_of

ROOT = Path(__file__).parent.parent
OF_RUN = (EngineConfig, SamplingParams, RunOptions, ChatOptions, FormOptions)
KINDS = (
    *OF_RUN, PackOptions, ModelsOptions, FitOptions, BenchOptions, PerplexityOptions, VerifyOptions, SimulateOptions,
    ServerConfig, ClusterConfig,
)  # fmt: skip
ALL = [setting for kind in KINDS for setting in settings_of(kind)]
MODULES = {
    "run": run,
    "chat": chat,
    "pack": pack,
    "models": models,
    "fit": fit,
    "bench": bench,
    "perplexity": perplexity,
    "serve": serve,
    "verify": verify,
    "simulate": simulate,
}
APPS = {name: module.app for name, module in MODULES.items()}


def named(name: str, kind: type = EngineConfig) -> Setting:
    return next(setting for setting in settings_of(kind) if setting.name == name)


def chosen(kind: type = EngineConfig, given: dict | None = None, **environment: str):
    """What is made of flags and of variables, without those of this process."""
    return build(kind, choose(settings_of(kind), given, environment))


def invoke(command: str, *arguments: object):
    return CliRunner().invoke(APPS[command], [str(argument) for argument in arguments])


def printed(command: str, *arguments: object) -> dict[str, tuple]:
    """What --print-config says of every setting: its value and where it came from."""
    result = invoke(command, "--print-config", *arguments)
    assert result.exit_code == 0, result.stderr
    return {name: tuple(row.values()) for name, row in json.loads(result.stdout).items()}


def refused(command: str, *arguments: object) -> str:
    result = invoke(command, *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    return result.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.variable)
def test_every_setting_has_help_a_variable_and_a_check(setting: Setting) -> None:
    assert setting.help and (setting.help.endswith(".") or setting.kind is tuple)
    assert re.fullmatch(r"HYBRID(_[A-Z0-9]+)+", setting.variable)
    assert setting.problem(object())
    assert setting.problem(setting.default) is None
    assert setting.problem(None) is None or not setting.optional


def test_nothing_is_declared_twice() -> None:
    assert not [name for name, count in Counter(setting.variable for setting in ALL).items() if count > 1]
    of_run = [setting.option for kind in OF_RUN for setting in settings_of(kind)]
    assert len(set(of_run)) == len(of_run)


def test_every_flag_of_a_command_is_a_declared_setting() -> None:
    assert set(COMMANDS) - {"plot", "store", "policy", "trace", "experiment"} == set(
        APPS
    )  # plot has only places of files, the others several commands
    for app in APPS.values():
        flags = {option for parameter in get_command(app).params for option in parameter.opts if option[:2] == "--"}
        assert flags - {setting.option for setting in ALL} == {"--print-config"} | ({"--version"} & flags)


def test_every_field_of_what_a_user_chooses_is_a_setting() -> None:
    for kind in (CacheConfig, DeviceConfig, *KINDS):
        declared = {setting.path[0] for setting in settings_of(kind)}
        unsaid = {"logits_processor", "grammar"} if kind is SamplingParams else set()  # no text says them
        assert declared == {field.name for field in fields(kind)} - unsaid


def test_defaults_are_allowed_and_are_those_of_the_dataclasses() -> None:
    for kind in OF_RUN:
        assert chosen(kind) == kind()
        check_settings(kind())
    check_params(SamplingParams())


def test_names_follow_from_fields() -> None:
    assert (named("threads").option, named("threads").variable) == ("--threads", "HYBRID_THREADS")
    assert named("format").field == "weight_format"
    assert named("cache_nblocks").variable == "HYBRID_CACHE_NBLOCKS"
    assert named("cache").path == ("cache", "mode")
    assert named("device_memory_gb").variable == "HYBRID_DEVICE_MEMORY_GB"
    assert named("prompt", BenchOptions).variable == "HYBRID_BENCH_PROMPT"
    assert {named("device").variable, named("isa").variable} == {"HYBRID_DEVICE", "HYBRID_ISA"}


TEXTS = {
    "HYBRID_THREADS": ("3", 3),
    "HYBRID_CACHE_NBLOCKS": ("auto", "auto"),
    "HYBRID_CACHE_NWAYS": ("4", 4),
    "HYBRID_DEVICE_MEMORY_GB": ("8", 8.0),
    "HYBRID_CUDA_GRAPHS": ("off", False),
    "HYBRID_BATCH_INVARIANT": ("Yes", True),
    "HYBRID_CACHE_DIR": ("~/models", Path("~/models").expanduser()),
    "HYBRID_FORMAT": ("int4,head=int8", "int4,head=int8"),
    "HYBRID_NUMA": ("2", "2"),
}


@pytest.mark.parametrize(("variable", "text", "value"), [(name, *pair) for name, pair in TEXTS.items()])
def test_a_variable_is_read_as_its_type(variable: str, text: str, value: object) -> None:
    config = chosen(**{variable: text})
    setting = next(setting for setting in settings_of(EngineConfig) if setting.variable == variable)
    assert setting.of(config) == value and type(setting.of(config)) is type(value)
    assert chosen(**{variable: ""}) == EngineConfig()
    check_config(config)


def test_variables_of_texts_hold_one_or_a_list() -> None:
    assert chosen(SamplingParams, HYBRID_STOP="end.").stop == ("end.",)
    assert chosen(SamplingParams, HYBRID_STOP='["a", "b\\n"]').stop == ("a", "b\n")
    with pytest.raises(ConfigError, match="^HYBRID_STOP is .* JSON list of texts, or unset it$"):
        chosen(SamplingParams, HYBRID_STOP="[1]")


def test_a_flag_beats_the_environment_which_beats_the_default() -> None:
    assert chosen().threads is None
    assert chosen(HYBRID_THREADS="2").threads == 2
    assert chosen(given={"threads": 1}, HYBRID_THREADS="2").threads == 1
    assert chosen(given={"cache": "off"}, HYBRID_CACHE_NWAYS="3").cache == CacheConfig(mode="off", nways=3)


def test_a_flag_that_says_the_default_beats_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("HYBRID_MAX_BATCH", "2")
    assert printed("run", "--json")["max_batch"] == (2, "environment", "HYBRID_MAX_BATCH")
    assert printed("run", "--json", "--max-batch", 8)["max_batch"] == (8, "flag", "--max-batch")


@pytest.mark.parametrize(
    ("variable", "text", "line"),
    [
        ("THREADS", "x", "HYBRID_THREADS is 'x'; it must be a whole number, from 1 to 1024, or unset it"),
        ("THREADS", "0", "HYBRID_THREADS 0 is out of range; it must be from 1 to 1024"),
        (
            "CACHE_NBLOCKS",
            "few",
            "HYBRID_CACHE_NBLOCKS is 'few'; it must be auto or a whole number, at least 1",
        ),
        ("LOAD", "lazy", "HYBRID_LOAD 'lazy' is unknown; allowed: auto, map, copy"),
        ("NUMA", "17", "HYBRID_NUMA '17' is unknown; allowed: auto, off, or a number of nodes from 1 to 16"),
        ("CACHE_REPLACE_POLICY", "MRU", "HYBRID_CACHE_REPLACE_POLICY 'MRU' is unknown; allowed: 2Q, ARC"),
        ("FORMAT", "int3", "HYBRID_FORMAT 'int3' is unknown; allowed: auto, bf16"),
        (
            "CHECK",
            "maybe",
            "HYBRID_CHECK is 'maybe'; it must be one of 1, true, yes, on, 0, false, no, off",
        ),
        ("DEVICE_TFLOPS", "0", "HYBRID_DEVICE_TFLOPS 0.0 is out of range; give a number above 0"),
        ("TEMPERATURE", "warm", "HYBRID_TEMPERATURE is 'warm'; it must be a number from 0 to 100, or unset it"),
        ("TEMPERATURE", "nan", "HYBRID_TEMPERATURE is nan; it must be a number at least 0 and at most 100"),
        ("CHUNK_SIZE", "4", "HYBRID_CHUNK_SIZE 4 is smaller than --max-batch 8"),
        ("CACHE_DIR", "~nobody-of-this-name/x", "HYBRID_CACHE_DIR is '~nobody-of-this-name/x'; it must be a path"),
        ("DEVICE", "tpu", "HYBRID_DEVICE is 'tpu'; allowed: auto, cpu, simulated, cuda, or unset it"),
        ("OVERLAP", "all", "HYBRID_OVERLAP 'all' is unknown; allowed: none, next"),
    ],
)
def test_a_bad_variable_is_one_line_that_names_it(monkeypatch, variable: str, text: str, line: str) -> None:
    monkeypatch.setenv(f"HYBRID_{variable}", text)
    assert refused("run", "--prompt", "x").startswith(line)


def test_a_bad_flag_beside_a_variable_is_named_itself(monkeypatch) -> None:
    monkeypatch.setenv("HYBRID_MAX_BATCH", "4")
    assert refused("run", "--threads", 0) == "--threads 0 is out of range; it must be from 1 to 1024"
    assert refused("run", "--chunk-size", 2).startswith("--chunk-size 2 is smaller than HYBRID_MAX_BATCH 4: ")


def test_an_error_is_renamed_only_where_it_names_a_variable() -> None:
    choices = choose(settings_of(EngineConfig), {}, {"HYBRID_CACHE": "off"})
    with pytest.raises(ConfigError, match="^--cache-dir x, HYBRID_CACHE on$"), named_as_given(choices):
        raise ConfigError("--cache-dir x, --cache on")


def test_the_environment_speaks_to_the_python_api(monkeypatch) -> None:
    monkeypatch.setenv("HYBRID_THREADS", "1")
    monkeypatch.setenv("HYBRID_MAX_SEQ_LEN", "128")
    monkeypatch.setenv("HYBRID_CACHE_NWAYS", "3")
    with LLM(max_seq_len=64) as llm:
        assert (llm.engine.plan.threads, llm.engine.plan.max_seq_len) == (1, 64)
    assert configure({"cache_dir": "~/x", "cache": "on"})[0].cache == "on"  # which a check refuses
    config, _ = configure({"cache": CacheConfig(nblocks=2), "threads": None})
    assert (config.cache, config.threads, config.max_seq_len) == (CacheConfig(nblocks=2), None, 128)
    assert configure({"cache": {"nblocks": 14, "warm": "~/x"}})[0].cache == CacheConfig(
        14, warm=Path("~/x").expanduser()
    )
    assert EngineConfig(model_path="~/x") == EngineConfig(Path("~/x").expanduser())
    assert configure({"cache": None})[0].cache == CacheConfig()
    assert configure({})[0].cache == CacheConfig(nways=3)
    monkeypatch.setenv("HYBRID_THREADS", "0")
    with pytest.raises(ConfigError, match="^HYBRID_THREADS 0 is out of range"):
        LLM()
    with pytest.raises(ConfigError, match="^threads 1025 is out of range"):
        LLM(threads=1025)
    for given, line in (
        ({"cache": {"nblock": 3}}, "cache has no setting 'nblock'; allowed: nblocks, nways"),
        ({"cache": {"nblocks": "x"}, "device": "simulated"}, "cache.nblocks 'x' is not an int"),
        ({"simulated": {"tflops": 0}}, "simulated.tflops 0 is out of range"),
        ({"chunk_size": 4}, "chunk_size 4 is smaller than max_batch 8"),
        ({"cache": 5}, "cache 5 is not a CacheConfig"),
    ):
        with pytest.raises(ConfigError, match=f"^{line}"):
            LLM(threads=1, **given)


def test_a_configuration_explains_itself() -> None:
    for kind in (EngineConfig, CacheConfig, DeviceConfig):
        for setting in settings_of(kind):
            assert f"    {'.'.join(setting.path)}: " in kind.__doc__ and setting.help in kind.__doc__


def test_a_whole_configuration_asks_no_environment(monkeypatch) -> None:
    monkeypatch.setenv("HYBRID_THREADS", "0")
    monkeypatch.setenv("HYBRID_TEMPERATURE", "warm")
    assert EngineConfig().threads is None and SamplingParams().temperature == 0.0
    with LLM.from_config(EngineConfig(threads=1, max_seq_len=64)) as llm:
        assert llm.generate("Once", replace(SamplingParams(), max_tokens=1))[0].token_ids


def test_the_arguments_of_an_llm_are_those_of_the_configuration() -> None:
    parameters = inspect.signature(LLM).parameters
    names = [field.name for field in fields(EngineConfig)]
    assert list(parameters) == [*names, "progress", "notice"]
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model_path", "device", "weight_format", "threads", "max_seq_len"]
    assert parameters["cache"].default is parameters["simulated"].default is None
    for wrong in ("thread", "thraeds"):
        with pytest.raises(TypeError, match=f"LLM\\(\\) has no argument '{wrong}'; did you mean 'threads'"):
            LLM(**{wrong: 2})
    with pytest.raises(TypeError, match="no argument 'zzz'; allowed: model_path, device"):
        LLM(zzz=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="too many positional"):
        LLM(None, "cpu", "auto", 1, 64, "bf16")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ({"cache": "on"}, "cache 'on' is not a CacheConfig; give one"),
        ({"cuda_graphs": 1}, "--cuda-graphs 1 is not a truth value; use True or False"),
        ({"routes": "x"}, "EngineConfig.routes 'x' is not a truth value; use True or False"),
        ({"model_path": 3}, "--model-path 3 is not a path; give one, or a text"),
        ({"isa": 3}, "EngineConfig.isa 3 is not a text"),
        ({"gpu_kv_tokens": "x"}, "--gpu-kv-tokens 'x' is not an int; it must be one"),
        ({"device": None}, "--device None is unknown; allowed: auto, cpu, simulated, cuda"),
        ({"cache": CacheConfig(nblocks="all")}, "--cache-nblocks 'all' is not an int; it must be one, at least 1"),
        ({"cache": CacheConfig(seed=-1)}, "CacheConfig.seed -1 is out of range; it must be at least 0"),
    ],
    ids=str,
)
def test_a_configuration_is_checked_by_its_declarations(choice: dict, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        check_config(EngineConfig(**choice))


def test_the_configuration_is_printed_as_a_table_and_nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(LLM, "from_config", None)
    monkeypatch.setenv("HYBRID_MAX_SEQ_LEN", "256")
    result = invoke("run", "--print-config", "--threads", 3, "--no-cuda-graphs", "--model-path", "/missing")
    assert result.exit_code == 0 and result.stderr == ""
    head, *rows = result.stdout.splitlines()
    start, end = head.index("value"), head.index("from")
    found = {row[:start].rstrip(): (row[start:end].rstrip(), row[end:]) for row in rows}
    assert found["threads"] == ("3", "flag --threads")
    assert found["cuda_graphs"] == ("no", "flag --no-cuda-graphs")
    assert found["max_seq_len"] == ("256", "environment HYBRID_MAX_SEQ_LEN")
    assert found["device"] == ("cpu", "environment HYBRID_DEVICE")  # of these tests
    assert found["max_batch"] == ("8", "default") and found["gpu_kv_tokens"] == ("(what fits)", "default")
    assert found["model_path"] == ("/missing", "flag --model-path") and found["stop"] == ("-", "default")
    assert set(found) == {setting.name for kind in OF_RUN for setting in settings_of(kind)}


def test_the_configuration_is_printed_as_json(monkeypatch) -> None:
    rows = printed("run", "--json", "--stop", "a", "--stop", "b", "--cache-warm", "x.json", "--device", "simulated")
    assert rows["stop"] == (["a", "b"], "flag", "--stop")
    assert rows["cache_warm"] == ("x.json", "flag", "--cache-warm")
    assert rows["device"] == ("simulated", "flag", "--device")
    assert rows["threads"] == (None, "default", None)
    assert printed("bench", "--output", "json", "-p", "64")["prompt"] == ("64", "flag", "--prompt")
    monkeypatch.setenv("HYBRID_MAX_TOKENS", "7")
    rows = printed("verify", "--json")
    assert rows["max_tokens"] == (7, "environment", "HYBRID_MAX_TOKENS")
    assert rows["prompt"][0] == list(verify.PROMPTS) and rows["thorough"] == (False, "default", None)
    monkeypatch.delenv("HYBRID_MAX_TOKENS")
    assert printed("verify", "--json")["max_tokens"] == (24, "default", None)


def test_what_is_printed_is_checked(monkeypatch) -> None:
    assert refused("run", "--print-config", "--threads", 0).startswith("--threads 0 is out of range")
    assert refused("verify", "--print-config", "--device", "cpu").startswith("--device 'cpu' is unknown")
    monkeypatch.setenv("HYBRID_DEVICE", "tpu")
    assert refused("run", "--print-config").startswith("HYBRID_DEVICE 'tpu' is unknown; allowed: auto, cpu")
    assert printed("run", "--json", "--device", "cpu")["device"] == ("cpu", "flag", "--device")


def test_a_command_has_no_variables_but_those_of_its_flags(monkeypatch) -> None:
    monkeypatch.setenv("HYBRID_MAX_BATCH", "x")
    assert "max_batch" not in printed("bench", "--output", "json")
    monkeypatch.setenv("HYBRID_BENCH_PROMPT", "64")
    assert printed("bench", "--output", "json")["prompt"] == ("64", "environment", "HYBRID_BENCH_PROMPT")


def test_a_command_names_settings_that_exist() -> None:
    def wrong(config: Annotated[EngineConfig, only("threads", max_tokens=3)]) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="EngineConfig has no setting max_tokens"):
        command(new_app())(wrong)


def test_a_flag_that_must_be_given_may_be_a_variable(monkeypatch) -> None:
    assert "Missing option '--input-path'" in invoke("pack", "--output-path", "store").stderr
    monkeypatch.setenv("HYBRID_PACK_INPUT_PATH", "/missing")
    assert refused("pack", "--output-path", "store").startswith("/missing: no such directory")


def test_the_documents_list_the_flags_that_exist() -> None:
    section = (ROOT / "docs/settings.md").read_text().split("## Flags of `hybrid run`")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1] for line in section.splitlines() if line.startswith("| `--")]
    listed = [flag.replace("--no-", "--") for row in rows for flag in re.findall(r"--[a-z-]+", row)]
    known = [setting.option for kind in OF_RUN for setting in settings_of(kind) if setting.flag]
    assert sorted(listed) == sorted([*known, "--print-config"])


def test_the_flags_of_run_stand_in_their_groups() -> None:
    text = invoke("run", "--help").stdout
    order = (
        "model-path",
        "prompt",
        "temperature",
        "threads",
        "cache-nblocks",
        "step-on",
        "device-tflops",
        "trace",
        "json",
    )
    places = [re.search(rf"^  --{flag} ", text, re.M).start() for flag in order]  # type: ignore[union-attr]
    assert places == sorted(places)
    heads = re.findall(r"^(\w.*):$", text, re.M)
    assert heads[:6] == ["Model", "Prompts", "Chat", "Sampling", "Engine", "Expert cache"] and "<str>" not in text
    assert re.findall(r"^(\w.*):$", invoke("simulate", "--help").stdout, re.M)[:2] == ["Traces", "Caches to replay"]


def test_nothing_heavy_is_imported_for_a_configuration() -> None:
    code = "import sys, hybrid.config, hybrid.settings, hybrid.core; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"typer", "numpy", "gpu_cache", "cpu_kernels"} & set(modules.stdout.split())


def test_a_variable_that_means_nothing_is_said_once(monkeypatch) -> None:
    monkeypatch.setenv("HYBRID_THREAD", "2")
    monkeypatch.setenv("HYBRID_BENCH_DEPTH", "0")  # of another command
    monkeypatch.setenv("HYBRID_XYZZY", "1")
    lines = invoke("run", "--print-config").stderr.splitlines()
    assert lines == [
        "warning: HYBRID_THREAD is no setting and has no effect; did you mean HYBRID_THREADS?",
        "warning: HYBRID_XYZZY is no setting and has no effect; hybrid run --print-config lists the settings",
    ]
