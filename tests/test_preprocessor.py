"""The packing command: what it says, how it ends, and that it leaves a store or none. And synthetic checkpoints."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from checkpoints import gated, random_tensors, write_checkpoint, write_tensors
from configs import CONFIGS
from typer.testing import CliRunner

from hybrid.commands.pack import app
from hybrid.formats.mix import MIXES
from hybrid.models import model_spec
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import cached_store
from hybrid.weights.store import Store, is_store

ROOT = Path(__file__).parent.parent


def test_a_model_is_packed_and_then_left_alone(tmp_path: Path) -> None:
    source, store = write_checkpoint(tmp_path / "hf", "qwen3_moe"), tmp_path / "new/store"
    first = _run(source, store, "--hf", "--format", "bf16", "--check", process=True)
    assert (first.returncode, first.stdout) == (0, f"{store}: packed\n")
    assert first.stderr == ""
    Store.open(store, check=True).close()
    again = _run(source, store)
    assert (again.returncode, again.stdout) == (0, f"{store}: already complete, nothing to do\n")


def test_a_model_is_packed_in_the_formats_that_were_asked_for(tmp_path: Path) -> None:
    source, store = write_checkpoint(tmp_path / "hf", "qwen3_moe"), tmp_path / "store"
    assert _run(source, store, "--format", "int4,head=int8").returncode == 0
    with Store.open(store, check=True) as opened:
        assert opened.format == "head int8, rest int4"
    _refused(_run(source, store), "already holds another store")
    _refused(_run(source, store, "--format", "int4,head"), "'head' is not understood")


def test_another_store_is_replaced_only_by_force(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert _run(write_checkpoint(tmp_path / "one", "llama"), store).returncode == 0
    other = write_checkpoint(tmp_path / "other", "qwen3")
    _refused(_run(other, store), "already holds another store")
    assert Store.open(store).spec.model_type == "llama"
    assert _run(other, store, "--force").returncode == 0
    assert Store.open(store).spec.model_type == "qwen3"


def test_the_script_is_the_same_command(tmp_path: Path) -> None:
    source, store = write_checkpoint(tmp_path / "hf", "llama"), tmp_path / "store"
    command = [sys.executable, "weights_preprocessor.py", "--input-path", str(source), "--output-path", str(store)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{store}: packed\n")


def test_bad_input_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    _refused(_run(tmp_path / "missing", tmp_path / "store", process=True), "missing: no such directory")
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    _refused(
        _run(source, tmp_path / "store", "--format", "int3"), "format 'int3' is unknown; allowed: auto, bf16, int8"
    )
    tensors = random_tensors(CONFIGS["qwen3_moe"])
    tensors["model.norm.weight"][0] = np.nan
    source = write_tensors(tmp_path / "nan", CONFIGS["qwen3_moe"], tensors)
    _refused(_run(source, tmp_path / "store", "--check"), "tensor model.norm.weight holds NaN")
    assert not is_store(tmp_path / "store")


def test_an_interrupt_ends_with_one_line_and_code_130(tmp_path: Path) -> None:
    source, store = write_checkpoint(tmp_path / "hf", "qwen3_moe"), tmp_path / "store"
    script = (
        "import os, signal; from hybrid.commands import console, pack; from hybrid.weights.content import Content\n"
        "chunks = Content.chunks\n"
        "def interrupted(self, tensor):\n"
        "    if tensor.name == 'layers.1.ffn.experts': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return chunks(self, tensor)\n"
        "Content.chunks = interrupted\n"
        "console.run_app(pack.app, 'hybrid pack')\n"
    )
    options = ["--input-path", source, "--output-path", store]
    command = [sys.executable, "-c", script, *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == f"interrupted; {store} is no store yet, the same command resumes it"
    assert "Traceback" not in result.stderr
    assert not is_store(store) and not list(store.glob("*.tmp"))
    assert _run(source, store).returncode == 0
    Store.open(store, check=True).close()


SHAPES = {
    "qwen3-30b-a3b": (2048, 32, 4, 128, 768, 151936),
    "qwen3-30b-a3b-fp8": (2048, 32, 4, 128, 768, 151936),
    "qwen3-0.6b": (1024, 16, 8, 0, 3072, 151936),
    "llama-3.2-3b": (3072, 24, 8, 0, 8192, 128256),
    "mixtral-8x7b": (4096, 32, 8, 8, 14336, 32000),
    "gpt-oss-20b": (2880, 64, 8, 32, 2880, 201088),
}


@pytest.mark.parametrize("like", SHAPES)
def test_synthetic_checkpoints_have_the_shapes_of_the_model(synthetic: ModuleType, like: str) -> None:
    spec = model_spec(synthetic.make_config(like, layers=2))
    layer = spec.layers[1]
    attention, ffn = layer.mixer, layer.feed_forward
    assert len(spec.layers) == 2
    sizes = (spec.hidden, attention.heads, attention.kv_heads, ffn.experts, ffn.intermediate, spec.vocab)
    assert sizes == SHAPES[like]


def test_synthetic_checkpoints_are_whole_random_and_repeatable(synthetic: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        synthetic.write_checkpoint(tmp_path / name, CONFIGS["qwen3_moe"], seed, shard_bytes=100_000)
    one, same, other = (Checkpoint.open(tmp_path / name) for name in ("one", "same", "other"))
    one.check()
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    experts = [one.read(f"model.layers.0.mlp.experts.{e}.up_proj.weight").tobytes() for e in range(10)]
    assert len(set(experts)) == 10
    embedding = "model.embed_tokens.weight"
    assert one.read(embedding).tobytes() == same.read(embedding).tobytes() != other.read(embedding).tobytes()
    assert 0.015 < one.read(embedding).astype(np.float32).std() < 0.025
    assert (one.read("model.norm.weight").astype(np.float32) == 1).all()


SMALL = {"hidden_size": 160, "intermediate_size": 64, "moe_intermediate_size": 64, "vocab_size": 300}
SMALL |= {"num_local_experts": 5, "num_experts": 9, "num_hidden_layers": 2}


@pytest.mark.parametrize(("like", "mix"), [("gpt-oss-20b", "mxfp4"), ("qwen3-30b-a3b-fp8", "fp8")])
def test_synthetic_checkpoints_are_quantised_as_published(
    synthetic: ModuleType, tmp_path: Path, like: str, mix: str
) -> None:
    """And their values are as large as those that are not quantised."""
    config = synthetic.make_config(like)
    synthetic.write_checkpoint(tmp_path / "hf", {**config, **{n: v for n, v in SMALL.items() if n in config}}, seed=1)
    checkpoint = Checkpoint.open(tmp_path / "hf")
    checkpoint.check()
    assert checkpoint.native == MIXES[mix]
    for source in gated(checkpoint, 1, 3):
        assert source.published == mix
        assert 0.01 < source.floats(0, source.count).std() < 0.04
    cached_store(tmp_path / "hf", tmp_path / "cache", check=True).close()


def test_synthetic_checkpoints_of_unknown_models_are_refused(synthetic: ModuleType) -> None:
    with pytest.raises(typer.BadParameter, match="qwen3-30b-a3b"):
        synthetic.make_config("gpt-2")
    with pytest.raises(typer.BadParameter, match="is of family qwen3_moe"):
        synthetic.make_config("qwen3-30b-a3b", family="llama")


@pytest.fixture(scope="module")
def synthetic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic", ROOT / "bench/synthetic_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthetic"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Ended:
    """What a command said, and how it ended."""

    returncode: int
    stdout: str
    stderr: str


def _run(source: Path, store: Path, *options: str, process: bool = False) -> Ended:
    """process: as a program of its own, which takes half a second to start."""
    arguments = ["--input-path", str(source), "--output-path", str(store), *options]
    if process:
        command = [sys.executable, "-m", "hybrid.cli", "pack", *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return Ended(ended.returncode, ended.stdout, ended.stderr)
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def _refused(result: Ended, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and message in result.stderr
