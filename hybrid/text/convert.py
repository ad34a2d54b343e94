"""Tokenizers of models that have no tokenizer.json: their files are converted once, by `transformers`; those in GGUF
files and Mistral's own, by ourselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from hybrid.errors import ConfigError
from hybrid.files import is_file
from hybrid.files.gguf import is_gguf
from hybrid.text.gguf_texts import TOKENIZER
from hybrid.text.tekken import TEKKEN, check_tekken, tekken_tokenizer

CONVERTED = TOKENIZER
EXTRA = "pip install 'hybrid-moe[convert]'"
_PROGRAM = Path(__file__).with_name("convert_process.py")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TIKTOKEN = ("tiktoken.model", "qwen.tiktoken")
_OTHERS = ("vocab.json", "vocab.txt", "vocab.bpe")
_PATIENCE = 1800  # seconds


def needs_conversion(model_path: Path) -> bool:
    """Whether a model directory has files of a tokenizer, but no tokenizer.json; a GGUF file counts as one."""
    if is_gguf(model_path):
        return True
    return not is_file(model_path / CONVERTED) and bool(_found(model_path, _all()))


def require_readable(model_path: Path) -> None:
    """Raise ConfigError for a model directory whose only tokenizer is Mistral's own, and cannot be read."""
    if not is_gguf(model_path) and not is_file(model_path / CONVERTED) and is_file(model_path / TEKKEN):
        check_tekken(model_path / TEKKEN)


def convert_tokenizer(model_path: Path) -> bytes:
    """The contents of the tokenizer.json that a model directory lacks. No code of the directory is run.

    Raises ConfigError; one that names what to install where that is the cause.
    """
    if is_file(model_path / TEKKEN):
        return tekken_tokenizer(model_path / TEKKEN)
    problem = f"{model_path} has no {CONVERTED}, only {', '.join(_found(model_path, _all()))}"
    if missing := [module for module in _needed(model_path) if not _is_installed(module)]:
        raise ConfigError(
            f"{problem}; to convert it, {EXTRA} ({', '.join(missing)}), or add the {CONVERTED} of the model"
        )
    reply = _ask(model_path.resolve())
    if "tokenizer" not in reply:
        raise ConfigError(
            f"{problem}, which cannot be converted ({reply.get('error')}); add the {CONVERTED} of the model"
        )
    return reply["tokenizer"].encode()


def _ask(model_path: Path) -> dict[str, str]:
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_OFFLINE": "1"}
    folders = [folder for folder in sys.path if folder and os.path.isabs(folder)]
    try:
        ran = subprocess.run(
            [sys.executable, "-I", "-S", str(_PROGRAM), str(model_path), *folders],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, **quiet}, cwd="/", timeout=_PATIENCE, check=False,
        )  # fmt: skip
        reply = json.loads(ran.stdout) if ran.stdout else {}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"error": " ".join(str(error).split())[:300]}
    return reply or {"error": f"the process that converts it ended with code {ran.returncode}"}


def _needed(model_path: Path) -> list[str]:
    needed = ["transformers"]
    if _found(model_path, _SENTENCEPIECE):
        needed += ["sentencepiece", "google.protobuf"]
    if _found(model_path, _TIKTOKEN):
        needed.append("tiktoken")
    return needed


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _all() -> tuple[str, ...]:
    return (TEKKEN, *_SENTENCEPIECE, *_TIKTOKEN, *_OTHERS)


def _found(model_path: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if is_file(model_path / name)]
