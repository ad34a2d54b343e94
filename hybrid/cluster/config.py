"""What a server is told about its replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hybrid.errors import ConfigError
from hybrid.settings import setting

MAX_REPLICAS = 1024


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of `hybrid serve` where several servers share the requests."""

    GROUP: ClassVar[str] = "cluster"
    COMMAND: ClassVar[str] = "serve"

    replicas: int = setting(
        1, "Servers of the model that share the requests, at most.", minimum=1, maximum=MAX_REPLICAS
    )
    min_replicas: int | None = setting(
        None, "As many run without requests; 0: none.", minimum=0, maximum=MAX_REPLICAS, shown="as --replicas"
    )
    ray_address: str | None = setting(
        None, "Ray cluster that runs them: auto, or HOST:PORT of its head.", shown="this machine alone"
    )
    start_seconds: float = setting(
        300.0, "How long a request waits for a replica while none runs.", minimum=0, above=True, maximum=86400
    )
    scale_up_seconds: float = setting(
        5.0, "How long the queue must be too long before one more is started.", minimum=0, maximum=86400
    )
    scale_down_seconds: float = setting(
        300.0, "How long fewer must have sufficed before one is stopped.", minimum=0, maximum=86400
    )

    @property
    def alone(self) -> bool:
        """Whether there is one server, in this very process."""
        return self.replicas == 1 and self.min_replicas is None and self.ray_address is None

    @property
    def fewest(self) -> int:
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def scales(self) -> bool:
        return self.fewest < self.replicas

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other."""
        if self.fewest > self.replicas:
            raise ConfigError(
                f"--min-replicas {self.min_replicas} is more than --replicas {self.replicas}; "
                f"give at most {self.replicas}, or raise --replicas"
            )
