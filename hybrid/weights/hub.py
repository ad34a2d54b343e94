"""Models by name: `org/name` is fetched from the Hugging Face hub, into its own cache, by `huggingface_hub`.

Its variables count: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT. A fetch that was interrupted is resumed by the
next one.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError, WeightsError
from hybrid.files import is_file
from hybrid.files.gguf import SUFFIX, is_gguf
from hybrid.models import model_spec
from hybrid.text.convert import require_readable
from hybrid.text.tekken import TEKKEN
from hybrid.weights.checkpoints.files import BESIDE, has_weights, read_config
from hybrid.weights.checkpoints.gguf_files import gguf_files, gguf_in, split_names
from hybrid.weights.checkpoints.published import native_mix
from hybrid.weights.manifest import MANIFEST

Progress = Callable[[str, int, int], None]

PREFIX = "hf:"
CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
OTHER_FORMS = ("*/*", "consolidated*")  # of the same weights
TEXT = (
    TEKKEN,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/tool_use.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "qwen.tiktoken",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:@\s]+))?(:(?P<file>\S+))?")


@dataclass(frozen=True)
class Repository:
    """What a user wrote, taken as a name of the hub. file: a GGUF file in the repository, which is the model then."""

    name: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def with_local_model(config: EngineConfig, progress: Progress | None = None, only_config: bool = False) -> EngineConfig:
    """A copy whose model is a directory here; see `local_model`."""
    return replace(config, model_path=config.model_path and local_model(config.model_path, progress, only_config))


def local_model(path: Path, progress: Progress | None = None, only_config: bool = False) -> Path:
    """The directory of a model, or its GGUF file: `path` itself, the only GGUF file in a directory without other
    weights, or the directory of the repository which it names, fetched if it is not here.

    only_config: without weights and tokenizer. A directory that is here wins over a repository of that name. Raises
    ConfigError and WeightsError, of a tokenizer that cannot be read too; a path that is neither is given back, for its
    reader to refuse.
    """
    if os.path.exists(path):
        found = _gguf_file(path, only_config)
        if not only_config:
            require_readable(found)
        return found
    repository = parse_name(str(path))
    return path if repository is None else _fetch(repository, progress, only_config)


def _gguf_file(path: Path, only_config: bool) -> Path:
    """Of a GGUF model the first file; any other path as it is. only_config: the other files need not be there."""
    if is_gguf(path):
        return (split_names if only_config else gguf_files)(path)[0]
    if path.is_dir() and not has_weights(path) and not is_file(path / MANIFEST):
        return gguf_in(path) or path
    return path


def parse_name(text: str) -> Repository | None:
    """`org/name`, `hf:org/name`, with `@revision` or without, and `:FILE.gguf`; None for what can be a path alone.

    Raises ConfigError.
    """
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        if text.startswith(PREFIX):
            raise ConfigError(f"{text}: is no name of a repository; write hf:org/name or hf:org/name@revision")
        return None
    if found["file"] and not found["file"].lower().endswith(SUFFIX):
        raise ConfigError(
            f"{text}: of a repository, a single GGUF file can be named, as org/name:FILE.gguf; or name the repository, "
            "with config.json and safetensors, as org/name"
        )
    return Repository(found["name"], found["revision"], found["file"])


def _fetch(repository: Repository, progress: Progress | None, only_config: bool) -> Path:
    """The directory of a repository, or its GGUF file. Of a directory the weights come last, once all else is here and
    says that they can be used.
    """
    if repository.file:  # which says what it is in its first bytes, and is fetched whole
        parts = [glob.escape(str(file)) for file in split_names(Path(repository.file))]
        return _gguf_of(repository, _snapshot(repository, progress, parts))
    texts = [] if only_config else TEXT
    folder = _snapshot(repository, progress, [CONFIG, *BESIDE, *texts], OTHER_FORMS)
    _check_config(repository, folder)
    if only_config:
        return folder
    try:
        require_readable(folder)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(folder), str(repository), 1)) from None
    config = read_config(folder)
    model_spec(config)
    native_mix(config, {})
    folder = _snapshot(repository, progress, [CONFIG, *BESIDE, *TEXT, *WEIGHTS], OTHER_FORMS, commit=folder.name)
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{repository}: the repository has no safetensors at its top; .bin and .pt are not read; name "
            "another repository of the model, or one of its GGUF files, as org/name:FILE.gguf"
        )
    return folder


def _snapshot(
    repository: Repository,
    progress: Progress | None,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
    commit: str | None = None,
) -> Path:
    """The directory with the files of a repository that match these patterns. commit: whatever was pushed since."""
    try:
        import huggingface_hub
        from huggingface_hub import utils
    except ImportError:
        raise ConfigError(
            f"{repository}: there is no such directory; to fetch it as a repository of the Hugging Face hub, "
            "pip install 'hybrid-moe[hub]'"
        ) from None
    bars, verbosity = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    utils.disable_progress_bars()  # ours is the only one
    utils.logging.set_verbosity_error()  # what it tries again is nobody's concern
    try:
        folder = huggingface_hub.snapshot_download(
            repository.name,
            revision=commit or repository.revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted) or None,
            tqdm_class=_bar(f"fetching {repository}", progress),
        )
    except Exception as error:  # of several libraries
        _refuse(repository, error)
    finally:
        utils.logging.set_verbosity(verbosity)
        if not bars:
            utils.enable_progress_bars()
    return Path(folder)


def _bar(what: str, progress: Progress | None) -> Any:
    """A bar as huggingface_hub wants it, which reports to ours."""
    from tqdm.auto import tqdm

    most = 0  # of what came over the network and what was put together, which have bars of their own

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.counts_bytes, self.total, self.seen = kwargs.get("unit") == "B", kwargs.get("total") or 0, 0

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.seen += int(n or 0)
            if progress and self.counts_bytes and self.seen > most:
                most = self.seen
                progress(what, most, max(self.total or 0, most))

    return Bar


def _refuse(repository: Repository, error: Exception) -> NoReturn:
    """Raise what a user can do something about."""
    from huggingface_hub import constants, errors

    line = " ".join(str(error).split())[:300] or type(error).__name__
    neither = f"{repository}: there is no such directory, and as a repository of {constants.ENDPOINT} it"
    if isinstance(error, errors.GatedRepoError):
        raise WeightsError(
            f"{repository}: access to the repository is granted by its owner: ask for it on its page, "
            "then set HF_TOKEN to a token of that account"
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise WeightsError(f"{repository}: the repository has no revision {repository.revision!r}") from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise WeightsError(
            f"{neither} is not there or not yours to see: check the spelling; for a private one set HF_TOKEN"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"{neither} is not in the cache, and HF_HUB_OFFLINE is set; unset it to fetch") from None
    if isinstance(error, errors.LocalEntryNotFoundError):
        raise WeightsError(f"{neither} cannot be reached and is not in the cache; connect, then try again") from None
    raise WeightsError(f"{repository}: fetching it failed ({line}); the same command resumes it") from None


def _gguf_of(repository: Repository, folder: Path) -> Path:
    if not repository.file or not (folder / repository.file).is_file():
        raise WeightsError(f"{repository}: the repository has no file {repository.file}; name one that it has")
    return gguf_files(folder / repository.file)[0]


def _check_config(repository: Repository, folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise WeightsError(
            f"{repository}: the repository has no {CONFIG} at its top, so it is no model for this program"
        )
