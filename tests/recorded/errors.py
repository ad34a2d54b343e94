"""What is said about wrong input: each entry does one wrong thing, and the record keeps the words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from recorded.answers import open_model
from recorded.models import FAMILIES, Workshop
from recorded.names import CONFIGS, MANIFEST, ROOT, command, preprocess, random_tensors, write_tensors

from hybrid import LLM, CacheConfig, HybridError, SamplingParams

COMMANDS: dict[str, tuple[object, ...]] = {
    "no command": ("fly",),
    "threads": ("run", "--threads", "abc"),
    "temperature": ("run", "--temperature", "warm"),
    "no path": ("run", "--model-path="),
    "no model": ("run", "--model-path", "/missing/model"),
    "device": ("run", "--device", "tpu"),
    "format": ("run", "--format", "int3"),
    "mix part": ("run", "--format", "int8,tail=int4"),
    "mix format": ("run", "--format", "int8,head=q4"),
    "mix twice": ("run", "--format", "head=int8,head=int4"),
    "kv format": ("run", "--kv-format", "q8"),
    "load": ("run", "--load", "slowly"),
    "numa": ("run", "--numa", "99"),
    "no threads": ("run", "--threads", "0"),
    "length": ("run", "--max-seq-len", "-5"),
    "chunk below batch": ("run", "--chunk-size", "2", "--max-batch", "3"),
    "top p": ("run", "--top-p", "1.5"),
    "prompts": ("run", "--n-prompts", "0"),
    "policy": ("run", "--cache-replace-policy", "MRU"),
    "admission": ("run", "--cache-admission", "some"),
    "mapping": ("run", "--cache-mapping", "plain"),
    "prefetch": ("run", "--cache-prefetch", "all"),
    "overlap": ("run", "--overlap", "all"),
    "mode": ("run", "--cache", "perhaps"),
    "stream": ("run", "--cache-stream", "perhaps"),
    "quota": ("run", "--cache-quota", "-1"),
    "blocks": ("run", "--cache-nblocks", "0"),
    "cache and nodes": ("run", "--device", "simulated", "--numa", "2"),
    "copy rate": ("run", "--device", "simulated", "--device-copy-gbps", "0"),
    "saving nothing": ("run", "--device", "cpu", "--cache-save", "x.json"),
    "step": ("run", "--step-on", "gpu"),
    "mirror": ("run", "--step-on", "torch-cpu", "--gpu-kv-tokens", "63"),
    "trace": ("run", "--trace", "x.txt"),
    "trace and prefetch": ("run", "--route-trace", "x.csv", "--overlap", "next"),
    "file": ("run", "--breakdown-csv", "/missing/x.csv"),
    "bench list": ("bench", "--prompt", "1;2"),
    "bench length": ("bench", "--prompt", "99999"),
    "bench output": ("bench", "--output", "pdf"),
    "verify device": ("verify", "--device", "cpu"),
    "simulate without": ("simulate", "--trace", "/missing.csv"),
}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "model type": ("llama", {"model_type": "gpt5"}),
    "no hidden size": ("llama", {"hidden_size": None}),
    "odd head": ("llama", {"head_dim": 23}),
    "heads": ("llama", {"num_key_value_heads": 5}),
    "activation": ("llama", {"hidden_act": "tanh"}),
    "rope": ("llama", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}),
    "rope factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}),
    "top k": ("mixtral", {"num_experts_per_tok": 7}),
    "layer types": ("gpt_oss", {"layer_types": ["full_attention"]}),
    "quantised": ("llama", {"quantization_config": {"quant_method": "awq"}}),
}


def error_cases() -> Iterator[tuple[str, Callable[[Workshop], str]]]:
    for name, arguments in COMMANDS.items():
        yield f"error/command/{name}", partial(_of_command, arguments=arguments)
    for name, (family, changes) in CONFIGURATIONS.items():
        yield f"error/config/{name}", partial(_of_config, family=family, changes=changes)
    for group, entries in {"checkpoint": CHECKPOINTS, "store": STORES, "engine": ENGINES, "request": REQUESTS}.items():
        for name, make in entries.items():
            yield f"error/{group}/{name}", partial(_of_call, call=make)


def _of_command(workshop: Workshop, arguments: tuple[object, ...]) -> str:
    prompt = ("--prompt", "x") if arguments[0] == "run" else ()
    code, out, err = command(*arguments, *prompt)
    return _plain(workshop, f"{code}: {out}{err}".rstrip())


def _of_config(workshop: Workshop, family: str, changes: dict[str, Any]) -> str:
    folder = workshop.new_folder()
    (folder / "config.json").write_text(json.dumps({**CONFIGS[family], **changes}))
    return _of_call(workshop, lambda workshop: LLM(folder, device="cpu", cache_dir=workshop.new_folder()))


def _of_call(workshop: Workshop, call: Callable[[Workshop], Any]) -> str:
    try:
        call(workshop)
    except HybridError as error:
        return _plain(workshop, f"{type(error).__name__}: {error}")
    return "no error"


def _plain(workshop: Workshop, text: str) -> str:
    """Without what is of this run or this machine."""
    text = re.sub(re.escape(str(workshop.folder)) + r"/\w+", "FOLDER", text).replace(str(ROOT), "ROOT")
    text = re.sub(r"FOLDER/tmp\w+-[0-9a-f]{12}", "STORE", text)
    return re.sub(r"\d+\.\d+ GB|\d+ processors", "SOME", text)


def _opened(folder: Path, workshop: Workshop, **choices: Any) -> None:
    LLM(folder, **{"device": "cpu", "cache_dir": workshop.new_folder(), **choices}).close()


def _changed(change: Callable[[dict[str, np.ndarray]], Any], **choices: Any) -> Callable[[Workshop], None]:
    """Open a checkpoint whose tensors were changed."""

    def call(workshop: Workshop) -> None:
        config, folder = CONFIGS["qwen3_moe"], workshop.new_folder()
        tensors = random_tensors(config)
        change(tensors)
        _opened(write_tensors(folder, config, tensors), workshop, **choices)

    return call


def _damaged(file: str, change: Callable[[Path], Any], shards: int = 1) -> Callable[[Workshop], None]:
    """Open a checkpoint one of whose files was changed."""

    def call(workshop: Workshop) -> None:
        config, folder = CONFIGS["llama"], workshop.new_folder()
        write_tensors(folder, config, random_tensors(config), shards)
        change(folder / file)
        _opened(folder, workshop)

    return call


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _flip(path: Path) -> None:
    """Damage the last byte of a file that is not padding."""
    data = bytearray(path.read_bytes())
    last = max(i for i, byte in enumerate(data) if byte)
    data[last] ^= 1
    path.write_bytes(data)


_ROUTER, _NORM = "model.layers.0.mlp.gate.weight", "model.norm.weight"
CHECKPOINTS: dict[str, Callable[[Workshop], Any]] = {
    "no config": lambda workshop: _opened(workshop.new_folder(), workshop),
    "config is no JSON": _damaged("config.json", lambda path: path.write_text("{")),
    "no weights": _damaged("model.safetensors", Path.unlink),
    "no tensor": _changed(lambda tensors: tensors.pop(_ROUTER)),
    "no expert": _changed(lambda tensors: tensors.pop("model.layers.2.mlp.experts.9.down_proj.weight")),
    "shape": _changed(lambda tensors: tensors.update({_NORM: tensors[_NORM][:-1]})),
    "type": _changed(lambda tensors: tensors.update({_NORM: np.zeros(96, np.int8)})),
    "not finite": _changed(lambda tensors: tensors[_NORM].fill(np.nan), check=True),
    "cut": _damaged("model.safetensors", _cut),
    "no safetensors": _damaged("model.safetensors", lambda path: path.write_bytes(b"PK\3\4" * 100)),
    "no shard": _damaged("model-00002-of-00003.safetensors", Path.unlink, shards=3),
    "preprocessor without": lambda workshop: _raise(_packing("/missing", "/missing")),
    "preprocessor format": lambda workshop: _raise(
        _packing(workshop.checkpoint("llama"), workshop.new_folder(), "--format", "x")
    ),
}


def _packing(source: object, output: object, *more: object) -> tuple[int, str, str]:
    return preprocess("--input-path", source, "--output-path", output, *more)


def _raise(result: tuple[int, str, str]) -> None:
    raise HybridError(f"{result[0]}: {result[1]}{result[2]}".rstrip())


def _of_store(change: Callable[[Path], Any], **choices: Any) -> Callable[[Workshop], None]:
    """Open a packed store that was changed."""

    def call(workshop: Workshop) -> None:
        cache = workshop.new_folder()
        _opened(FAMILIES["llama"].write(workshop.new_folder()), workshop, cache_dir=cache)
        (manifest,) = cache.glob(f"*/{MANIFEST}")
        change(manifest)
        _opened(manifest.parent, workshop, **choices)

    return call


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _first_shard(manifest: Path) -> Path:
    return sorted(manifest.parent.glob("*.safetensors"))[0]


STORES: dict[str, Callable[[Workshop], Any]] = {
    "other format": _of_store(lambda manifest: None, weight_format="int8"),
    "not finished": _of_store(lambda manifest: manifest.rename(manifest.with_name("packing.json"))),
    "version": _of_store(lambda manifest: _edit(manifest, layout_version=0)),
    "kind": _of_store(lambda manifest: _edit(manifest, kind="other")),
    "manifest": _of_store(lambda manifest: _edit(manifest, source="other")),
    "damaged": _of_store(lambda manifest: _flip(_first_shard(manifest))),
    "cut": _of_store(lambda manifest: _cut(_first_shard(manifest))),
    "no shard": _of_store(lambda manifest: _first_shard(manifest).unlink()),
}


def _opening(name: str = "qwen3_moe", **choices: Any) -> Callable[[Workshop], None]:
    return lambda workshop: open_model(workshop, name, **choices).close()


def _caching(name: str = "qwen3_moe", **settings: Any) -> Callable[[Workshop], None]:
    return _opening(name, device="simulated", cache=CacheConfig(**settings))


ENGINES: dict[str, Callable[[Workshop], Any]] = {
    "format is no text": _opening(format=8),
    "invariance": _opening(batch_invariant="no"),
    "threads": _opening(threads=2.0),
    "instruction set": _opening(isa="sse9"),
    "too long": _opening(max_seq_len=100_000),
    "more nodes than threads": _opening(numa="4", threads=2),
    "nodes and a step": _opening(numa="2", step_on="torch-cpu"),
    "cache of a dense model": _caching("llama", nblocks=1, nways=1),
    "policy": _caching(policy="MRU"),
    "ways": _caching(nblocks=1, nways=0),
    "warm": _caching(warm=Path("/missing.json")),
    "routes of a dense model": _opening("llama", route_trace="/missing.csv"),
    "routes": _opening(route_trace="/missing.csv"),
}


def _asking(prompt: Any, name: str = "qwen3_moe", **params: Any) -> Callable[[Workshop], None]:
    def call(workshop: Workshop) -> None:
        with open_model(workshop, name) as llm:
            llm.generate(prompt, SamplingParams(**params))

    return call


def _closed(workshop: Workshop) -> None:
    llm = open_model(workshop, "llama")
    llm.close()
    llm.generate([1])


def _chat(workshop: Workshop) -> None:
    with open_model(workshop, "llama") as llm:
        llm.chat([{"role": "user", "content": "x"}])


REQUESTS: dict[str, Callable[[Workshop], Any]] = {
    "empty": _asking([[]]),
    "long": _asking([1] * 257),
    "token": _asking([1, 131]),
    "negative": _asking([-1]),
    "kind": _asking(5),
    "fractions": _asking([[1.5]]),
    "text without a tokenizer": _asking("x"),
    "stop without a tokenizer": _asking([1], stop=("x",)),
    "temperature": _asking([1], temperature=-1.0),
    "top k": _asking([1], top_k=-1),
    "max tokens": _asking([1], max_tokens=-1),
    "logprobs": _asking([1], logprobs=-1),
    "closed": _closed,
    "chat without a template": _chat,
}
