"""`hybrid store`: the packed models in the cache, listed and removed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from hybrid.commands.console import say, show, show_json
from hybrid.commands.flags import command, new_app, only
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.settings import check_settings, setting

if TYPE_CHECKING:
    from hybrid.weights.kept import KeptStore

app = new_app()

_DAY = 86400


@dataclass(frozen=True)
class ListOptions:
    """How the list is printed."""

    COMMAND: ClassVar[str] = "store_ls"
    GROUP: ClassVar[str] = "output"

    json: bool = setting(False, "Print one JSON object.")


@dataclass(frozen=True)
class CollectOptions:
    """What is removed."""

    COMMAND: ClassVar[str] = "store_gc"
    GROUP: ClassVar[str] = "files"

    older_than: int | None = setting(
        None, "Also those that were not used for so many days.", minimum=0, metavar="DAYS", shown="none of these"
    )
    dry_run: bool = setting(False, "Only say what would be removed.", group="output")


Cache = Annotated[EngineConfig, only("cache_dir")]


@command(app)
def ls(config: Cache, options: ListOptions) -> None:
    """List the packed models in the cache: size, formats, days since the last use, and the checkpoint of each."""
    folder, stores = _stores(config)
    if options.json:
        return show_json({"cache_dir": str(folder), "stores": [_as_json(store) for store in stores]}, indent=1)
    show("\n".join(_table(stores) if stores else [f"{folder} has no packed models"]))


@command(app)
def rm(
    names: Annotated[list[str], typer.Argument(help="Names as `hybrid store ls` shows them.")], config: Cache
) -> None:
    """Remove packed models by name. A model is packed again when it is used again; checkpoints are not touched."""
    folder, stores = _stores(config)
    by_name = {store.name: store for store in stores}
    if unknown := next((name for name in names if name not in by_name), None):
        raise ConfigError(f"there is no packed model {unknown!r:.200} in {folder}; `hybrid store ls` lists them")
    _remove([by_name[name] for name in dict.fromkeys(names)])


@command(app)
def gc(config: Cache, options: CollectOptions) -> None:
    """Remove packed models that nobody can use: unfinished, damaged, or of a checkpoint that is gone or has changed."""
    check_settings(options)
    _, stores = _stores(config)
    limit = None if options.older_than is None else time.time() - options.older_than * _DAY
    chosen = [store for store in stores if store.useless or (limit is not None and store.used < limit)]
    if options.dry_run:
        for store in chosen:
            show(f"{store.name}: {_size(store)}, {store.useless or 'not used lately'}; would be removed")
    else:
        _remove(chosen)
    freed = sum(store.nbytes for store in chosen)
    say(f"{len(chosen)} of {len(stores)} packed models, {freed / 1e9:.2f} GB")


def _stores(config: EngineConfig) -> tuple[Path, list[KeptStore]]:
    from hybrid.weights.kept import kept_stores
    from hybrid.weights.pack import default_cache_dir

    folder = config.cache_dir or default_cache_dir()
    return folder, kept_stores(folder)


def _remove(stores: list[KeptStore]) -> None:
    from hybrid.weights.kept import remove_store

    for store in stores:
        remove_store(store)
        show(f"{store.name}: removed, {_size(store)}")


def _table(stores: list[KeptStore]) -> list[str]:
    from hybrid.commands.tables import markdown

    columns = ("name", "size", "formats", "days unused", "state", "checkpoint")
    return markdown(columns, [_row(store) for store in stores], (True, False, True, False, True, True))


def _row(store: KeptStore) -> tuple[str, ...]:
    days = max(0.0, time.time() - store.used) / _DAY
    return store.name, _size(store), store.formats or "-", f"{days:.0f}", store.useless or "ok", store.source or "-"


def _size(store: KeptStore) -> str:
    return f"{store.nbytes / 1e9:.2f} GB"


def _as_json(store: KeptStore) -> dict[str, Any]:
    return {"name": store.name, **asdict(store), "path": str(store.path), "useless": store.useless or None}
