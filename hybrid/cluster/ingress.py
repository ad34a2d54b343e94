"""The server as an application of Ray Serve: on a cluster that is there already, behind Ray Serve's own address."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from hybrid.cluster.config import ClusterConfig
from hybrid.cluster.front import Front
from hybrid.cluster.on_ray import RayReplicas, deployment, require_ray
from hybrid.config import EngineConfig, check_config
from hybrid.errors import ConfigError
from hybrid.server.config import ServerConfig
from hybrid.server.gate import Gate
from hybrid.server.log import lines_or_nothing, stderr
from hybrid.settings import build, check_settings, choose, named_as_given, settings_of

_ROOM = 100  # requests beyond those of replicas: for what the front answers itself
_RAYS = {"host", "port", "ray_address"}  # Ray Serve decides of these


def app(settings: Mapping[str, Any]) -> Any:
    """What `serve run` and `serve deploy` take. settings: of `hybrid serve`, as `{"model_path": "/models/x",
    "replicas": 4}`; a text means what it means in a variable. Raises ConfigError.
    """
    require_ray()
    from ray import serve

    config, options, cluster = _read(settings)
    names = options.names_of(config.model_path)
    front = serve.deployment(
        serve.ingress()(Ingress),
        name="Front",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=cluster.replicas * (config.max_batch + options.max_queue) + _ROOM,
    )
    return front.bind(options, cluster, names, deployment(config, options, cluster, names))


class Ingress:
    """A front in a process that Ray Serve runs."""

    def __init__(self, options: ServerConfig, cluster: ClusterConfig, names: tuple[str, ...], handle: Any) -> None:
        """handle: of the deployment whose replicas have the model."""
        logging.getLogger().addHandler(lines_or_nothing(stderr()))  # Ray keeps it
        self._front, self._options = Front(options, cluster, names), options
        self._front.opened(RayReplicas(handle))

    def __serve_build_asgi_app__(self) -> Gate:
        return Gate(self._front, self._options)


def _read(settings: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig, ClusterConfig]:
    kinds = (EngineConfig, ServerConfig, ClusterConfig)
    known = {setting.name: setting for kind in kinds for setting in settings_of(kind)}
    for name in settings:
        if name in _RAYS:
            raise ConfigError(f"{name} is for Ray Serve to decide: leave it out, and see http_options of serve deploy")
        if name not in known:
            raise ConfigError(f"{name!r:.80} is no setting of hybrid serve; docs/settings.md lists them")
    given = {name: known[name].parse(_as_text(value)) for name, value in settings.items()}
    choices = choose(known.values(), given)
    with named_as_given(choices):
        config, options, cluster = (
            build(EngineConfig, choices),
            build(ServerConfig, choices),
            build(ClusterConfig, choices),
        )
        check_settings(options)
        check_settings(cluster)
        check_config(config)
        cluster.check()
    return config, options, cluster


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
