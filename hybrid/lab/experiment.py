"""An experiment as a file: models and their traces, caches, machines, and what others have claimed of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gpu_cache.admission import Costs, known_admission
from gpu_cache.costs import Machine
from gpu_cache.curves import CURVES
from gpu_cache.geometry import MAPPINGS
from gpu_cache.outside import is_file
from gpu_cache.policies import known_policy
from gpu_cache.prefetch import is_file_of_prefetch, known_prefetch
from gpu_cache.simulator import Setting, policy_names
from gpu_cache.trace import Calls
from hybrid.errors import ConfigError, cache_errors
from hybrid.lab.grid import combinations
from hybrid.lab.parts import CHE, FIGURES, LAYERS, Caches, Claim, Curves, Model, Rates
from hybrid.lab.toml import from_table, read_toml

T = TypeVar("T")


@dataclass(frozen=True)
class Experiment:
    """What a file describes. path: of the file, from whose folder its paths start."""

    path: Path
    title: str
    about: str
    models: tuple[Model, ...]
    caches: tuple[Caches, ...]
    machines: tuple[Rates, ...]
    claims: tuple[Claim, ...]
    curves: tuple[Curves, ...]

    @property
    def folder(self) -> Path:
        """Of its results, if none is named: beside the file, named as it without the suffix."""
        return self.path.with_suffix("")

    def trace_path(self, name: str) -> Path:
        return self.path.parent / Path(name).expanduser()

    def settings(self, model: Model, calls: Calls) -> list[Setting]:
        """What is replayed of a model, each once. Raises ConfigError for what no cache of it can have."""
        found: list[Setting] = []
        wanted = [(f"[[caches]] {at}", caches) for at, caches in enumerate(self.caches, 1)]
        wanted += [(f"[[claims]] {at}", one) for at, claim in enumerate(self.claims, 1) if (one := claim.caches())]
        for name, caches in wanted:
            if caches.models is None or model.name in caches.models:
                with cache_errors(f"{self.path}: {name}, {model.name}:"):
                    for setting in combinations(caches, calls):
                        setting.check(calls, self._costs(model))
                        found.append(setting)
        return list(dict.fromkeys(found))

    def machines_of(self, model: Model) -> dict[str, Machine]:
        return {} if model.expert_mb is None else {one.name: one.machine(model.expert_mb) for one in self.machines}

    def _costs(self, model: Model) -> Costs | None:
        """Of any machine: which one does not matter for what a cache can have."""
        return next((machine.costs for machine in self.machines_of(model).values()), None)


@dataclass(frozen=True)
class _File:
    """The keys of the whole file; tables are read one by one."""

    title: str = ""
    about: str = ""


TABLES: Mapping[str, type[Any]] = {
    "models": Model,
    "caches": Caches,
    "machines": Rates,
    "claims": Claim,
    "curves": Curves,
}


def load(path: str | Path) -> Experiment:
    """Read and check an experiment, but not its traces. Raises ConfigError with the key that is wrong."""
    path = Path(path).expanduser()
    data = read_toml(path)
    plain = {key: value for key, value in data.items() if key not in TABLES}
    known = [*(_File.__dataclass_fields__), *(f"[[{name}]]" for name in TABLES)]
    if unknown := [key for key in plain if key not in _File.__dataclass_fields__]:
        raise ConfigError(f"{path} has no key {unknown[0]!r:.80}; allowed: {', '.join(known)}")
    head = from_table(_File, plain, str(path))
    read = {name: _tables(kind, data.get(name, []), f"{path}: [[{name}]]") for name, kind in TABLES.items()}
    experiment = Experiment(path, head.title or path.stem, head.about, **read)
    _check(experiment)
    where, folder = f"{path}: [[", path.parent
    for at, one in enumerate(experiment.curves, 1):
        _check_curves(f"{where}curves]] {at}", one)
    caches = tuple(_named(f"{where}caches]] {at}", folder, one) for at, one in enumerate(experiment.caches, 1))
    claims = tuple(_checked(f"{where}claims]] {at}", folder, one) for at, one in enumerate(experiment.claims, 1))
    return replace(experiment, caches=caches, claims=claims)


def _tables(kind: type[T], tables: Any, where: str) -> tuple[T, ...]:
    if not isinstance(tables, list):
        raise ConfigError(f"{where} is no array of tables; write its head in two brackets")
    return tuple(from_table(kind, table, f"{where} {at}") for at, table in enumerate(tables, 1))


def file_name(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "model"


def _check(experiment: Experiment) -> None:
    path = experiment.path
    if not experiment.models:
        raise ConfigError(f"{path} has no [[models]]; give at least one, with name and traces")
    for what in ("models", "machines"):
        names = [one.name for one in getattr(experiment, what)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"{path}: [[{what}]] has the name {twice[0]!r:.80} twice; give each its own")
    files = {file_name(model.name): model.name for model in experiment.models}
    for at, model in enumerate(experiment.models, 1):
        if files[file_name(model.name)] != model.name:
            other = files[file_name(model.name)]
            raise ConfigError(f"{path}: [[models]] {model.name!r} and {other!r} would have the same files; rename one")
        if not model.traces:
            raise ConfigError(f"{path}: [[models]] {at}, traces is empty; give at least one path")
        for machine in experiment.machines if model.expert_mb is not None else ():
            with cache_errors(f"{path}: [[machines]] {machine.name}, [[models]] {model.name}:"):
                machine.machine(model.expert_mb or 0.0)
    known = [model.name for model in experiment.models]
    for what in ("caches", "claims", "curves"):
        for at, one in enumerate(getattr(experiment, what), 1):
            if unknown := [name for name in one.models or () if name not in known]:
                raise ConfigError(
                    f"{path}: [[{what}]] {at}, models has {unknown[0]!r:.80}; allowed: {', '.join(known)}"
                )


def _checked(where: str, folder: Path, claim: Claim) -> Claim:
    """A claim that has what its figure needs, with its policies as they are spelt."""
    if claim.figure not in FIGURES:
        raise ConfigError(f"{where}, figure is {claim.figure!r:.80}; allowed: {', '.join(FIGURES)}")
    for key in ("policy", "beside", "nways", "share"):
        needed = key in FIGURES[claim.figure]
        if needed != bool(getattr(claim, key)):
            raise ConfigError(f"{where}: {claim.figure!r} {'needs' if needed else 'has no'} {key}")
    if len(claim.published) not in {1, max(1, len(claim.nways))}:
        raise ConfigError(f"{where}, published has {len(claim.published)} values; give one, or one for each of nways")
    if (caches := claim.caches()) is None:
        return claim
    policies = _named(where, folder, caches).policies
    return replace(claim, policy=policies[0], beside=policies[-1] if claim.beside else None)


def _named(where: str, folder: Path, caches: Caches) -> Caches:
    """The same with every word as it is spelt, files of policies from the folder of the experiment."""

    def spelt(key: str, words: Iterable[str], known: Callable[[str], str]) -> tuple[str, ...]:
        with cache_errors(f"{where}, {key}:"):
            return tuple(dict.fromkeys(map(known, words)))

    allowed = policy_names()
    if empty := next((key for key, value in vars(caches).items() if value == ()), None):
        raise ConfigError(f"{where}, {empty} is empty; give at least one")
    policies = [name for word in caches.policies for name in (allowed if word.lower() == "all" else (word,))]
    return replace(
        caches,
        policies=spelt("policies", _from(folder, policies), lambda name: known_policy(name, allowed)),
        admissions=spelt("admissions", _from(folder, caches.admissions), known_admission),
        prefetch=spelt("prefetch", _from(folder, caches.prefetch, is_file_of_prefetch), known_prefetch),
        mapping=_among(where, "mapping", caches.mapping, MAPPINGS),
        nblocks=_among(where, "nblocks", caches.nblocks, (LAYERS,)),
        quota=_among(where, "quota", caches.quota, ("none",)),
    )


def _check_curves(where: str, curves: Curves) -> None:
    _among(where, "policies", curves.policies, (*CURVES, CHE))
    _among(where, "nblocks", curves.nblocks, (LAYERS,))
    _among(where, "mapping", (curves.mapping,), MAPPINGS)


def _among(where: str, key: str, words: tuple[T, ...], allowed: Sequence[str]) -> tuple[T, ...]:
    """The words, if each is a number or allowed. Raises ConfigError."""
    if wrong := [word for word in words if type(word) is str and word not in allowed]:
        numbers = "" if len(allowed) > 1 else "a whole number or "
        raise ConfigError(f"{where}, {key} has {wrong[0]!r:.80}; allowed: {numbers}{', '.join(allowed)}")
    return words


def _from(folder: Path, names: Iterable[str], is_file: Callable[[str], bool] = is_file) -> list[str]:
    """Names of files start from a folder; others are as they are."""
    return [str(folder / Path(name).expanduser()) if is_file(name) else name for name in names]
