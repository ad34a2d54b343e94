"""What the tables of an experiment's file say: models, caches, machines."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_cache.costs import Machine

LAYERS = "layers"  # as nblocks: an index for each layer


@dataclass(frozen=True)
class Model:
    """A model and traces of it. traces: paths, from the folder of the experiment; layers, experts: None: what occurs.

    expert_mb: MB of an expert, which copies and speeds need. train_fraction: share of the steps of every trace that
    prefetches learn from, while the others are replayed.
    """

    name: str
    traces: tuple[str, ...]
    layers: int | None = None
    experts: int | None = None
    expert_mb: float | None = None
    train_fraction: float | None = None


@dataclass(frozen=True)
class Caches:
    """Every combination of these is replayed, beside the bound and the best fixed experts.

    nblocks: indexes; "layers": one for each layer. nways: a whole number is slots of an index, another number the share
    of all experts that have a slot. quota: "none" or copies a step. prefetch: as
    `gpu_cache.prefetch.known_prefetch` takes it. models: None: all. seeds: of policies that draw.
    """

    nways: tuple[int | float, ...]
    policies: tuple[str, ...]
    nblocks: tuple[int | str, ...] = (LAYERS,)
    mapping: tuple[str, ...] = ("modulo",)
    admissions: tuple[str, ...] = ("always",)
    quota: tuple[int | str, ...] = ("none",)
    copy_delay: tuple[int, ...] = (0,)
    prefetch: tuple[str, ...] = ("none",)
    seeds: tuple[int, ...] = (0,)
    models: tuple[str, ...] | None = None


CHE = "Che"  # among curves: LRU by popularity alone


@dataclass(frozen=True)
class Curves:
    """Hits of every number of ways, which need no replays. policies: those of `gpu_cache.curves.CURVES`, and "Che".

    nblocks, mapping, models: as in `Caches`.
    """

    policies: tuple[str, ...]
    nblocks: tuple[int | str, ...] = (LAYERS,)
    mapping: str = "modulo"
    models: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Rates:
    """A machine: GB/s of copies to the device, and with which device and CPU read experts.

    other_ms: of a step beside its experts; layer_ms: to begin and join a layer on the device.
    """

    name: str
    pcie_gbps: float
    device_gbps: float
    cpu_gbps: float
    other_ms: float = 0.0
    layer_ms: float = 0.0

    def machine(self, expert_mb: float) -> Machine:
        rates = (self.pcie_gbps, self.device_gbps, self.cpu_gbps)
        return Machine(*rates, expert_mb * 1e6, self.other_ms, self.layer_ms)


FIGURES = {  # what a claim can be of, and the keys that each needs
    "hits": ("policy", "nways"),  # of all calls, in %
    "points": ("policy", "beside", "nways"),  # hits of policy less those of beside
    "ratio": ("policy", "beside", "nways"),  # hits of policy in % of those of beside
    "same experts": (),  # of a token, which the one before chose at that layer, in %
    "same sets": (),  # tokens whose experts at a layer are exactly those of the one before, in %
    "layer before": (),  # experts whose number the layer before chose, too, in %
    "covered": ("share",),  # calls of the most called experts of each layer, in %
    "covered later": ("share",),  # the same, chosen by the first half of the steps, counted in the second
}


@dataclass(frozen=True)
class Claim:
    """What somebody has published, to be held against the traces here.

    figure: one of `FIGURES`. published: its value in % or points, one for each of nways or one for
    all; to: the upper end where a range was published. tolerance: how far ours may be off. policy, beside, nblocks,
    nways, mapping, seeds: the cache, as in `Caches`; share: of the experts of a layer. explained: why ours differs.
    """

    says: str
    source: str
    figure: str
    published: tuple[float, ...]
    to: float | None = None
    tolerance: float = 0.05
    policy: str | None = None
    beside: str | None = None
    nblocks: int | str = LAYERS
    nways: tuple[int | float, ...] = ()
    mapping: str = "modulo"
    seeds: tuple[int, ...] = (0,)
    share: float | None = None
    models: tuple[str, ...] | None = None
    explained: str = ""

    def caches(self) -> Caches | None:
        """What must be replayed for it."""
        policies = tuple(name for name in (self.policy, self.beside) if name is not None)
        if not policies:
            return None
        mapping, blocks = (self.mapping,), (self.nblocks,)
        return Caches(self.nways, policies, blocks, mapping, seeds=self.seeds, models=self.models)

    def is_of(self, model: str) -> bool:
        return self.models is None or model in self.models
