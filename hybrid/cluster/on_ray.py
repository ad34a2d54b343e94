"""Replicas that Ray Serve runs: it places them on machines, starts and stops them with the queue, and replaces those
that die. Ray is imported when the first of this is used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from importlib.util import find_spec
from typing import Any

import hybrid.errors
from hybrid.cluster.asking import Asked, QueueFull, ReplicaLost, Reply
from hybrid.cluster.config import ClusterConfig
from hybrid.cluster.replica import Replica, options_of
from hybrid.cluster.shares import processors_each, share
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError, HybridError
from hybrid.machine.hardware import probe
from hybrid.server.config import ServerConfig
from hybrid.server.service import Service
from hybrid.server.telemetry import Telemetry
from hybrid.settings import settings_of

APP = "hybrid"  # the name of the application
_MODEL = "Model"  # the deployment whose replicas have the model
_ROUTER = "hybrid.cluster.router.PrefixRouter"
_OBJECT_STORE = 256 << 20  # bytes; requests and answers pass through it
_ASK_SECONDS = 3.0  # for replicas to say what they do
_STARTS = 3  # of a replica before its error is told
_LOGGING = {"log_level": "ERROR", "enable_access_log": False}
_DRAIN_MORE = 10.0  # seconds for what ends by an error


def require_ray() -> None:
    """Raise ConfigError where Ray Serve is not installed."""
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise ConfigError("--replicas needs Ray Serve; install it: pip install 'hybrid-moe[cluster]'")


class RayReplicas:
    """The replicas of a deployment, asked through its handle. Implements `Replicas`."""

    def __init__(self, handle: Any, end: Callable[[], None] = lambda: None) -> None:
        """end: ends them, unless others look after that."""
        self._handle, self._end = handle, end
        self._streams = handle.options(method_name="answer", stream=True)
        self.described: list[str] = []  # what a replica says of itself, for people

    async def ask(self, asked: Asked) -> AsyncGenerator[Reply, None]:
        """As `Replicas` has it."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        response = self._streams.remote(asked)
        try:
            async for reply in response:
                yield reply
        except BackPressureError:
            raise QueueFull from None
        except RayTaskError:  # of the code that ran there
            raise
        except (RayError, RayServeException):
            raise ReplicaLost from None
        finally:
            response.cancel()

    async def all_say(self, what: str, *arguments: Any) -> dict[str, Any]:
        """As `Replicas` has it."""
        from ray.serve.exceptions import DeploymentUnavailableError

        said = self._handle.broadcast("say", what, *arguments)
        try:
            answers = await said.results_async(timeout_s=_ASK_SECONDS, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):  # the latter is raised where none runs
            return {}
        return dict(answer for answer in answers if isinstance(answer, tuple))

    def close(self) -> None:
        """As `Replicas` has it."""
        self._end()


class Worker:
    """What Ray Serve runs: a replica, and the model that it opens."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it, on the event loop of the replica
        self, config: EngineConfig, options: ServerConfig, names: tuple[str, ...], most: int
    ) -> None:
        """most: replicas that there may be. Raises HybridError where the model cannot be opened."""
        import ray
        from ray import serve

        from hybrid.serving.llm import LLM

        rank = serve.get_replica_context().rank
        threads = int(ray.get_runtime_context().get_assigned_resources()["CPU"])
        processors = next(
            node["Resources"].get("CPU", threads)
            for node in ray.nodes()
            if node["NodeID"] == ray.get_runtime_context().get_node_id()
        )
        own = share(config, threads, min(most, int(processors) // threads), rank.local_rank)
        service = Service(options, names, Telemetry.open() if options.telemetry else None)
        loop = asyncio.get_running_loop()
        service.opened(await loop.run_in_executor(None, LLM.from_config, own))
        self._lost: BaseException | None = None
        service.watch(lambda: LLM.from_config(own), self._lose)
        self._replica = Replica(serve.get_replica_context().replica_id.unique_id, service)

    async def answer(self, asked: Asked) -> AsyncGenerator[Reply, None]:
        async with aclosing(self._replica.answer(asked)) as replies:
            async for reply in replies:
                yield reply

    async def say(self, what: str, *arguments: Any) -> tuple[str, Any]:
        """The answer of one of its methods, with its name."""
        return self._replica.name, await getattr(self._replica, what)(*arguments)

    def check_health(self) -> None:
        """Raises where Ray should start another in its place."""
        if self._lost:
            raise self._lost

    def _lose(self, error: BaseException) -> None:
        self._lost = error

    def __del__(self) -> None:
        if replica := getattr(self, "_replica", None):
            replica.service.close()


class RayCluster:
    """A Ray cluster, or this machine as one, while the replicas run there.

    What Ray starts on this machine ends with the thread that has started it, so that is one of its own.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster, self._own = cluster, cluster.ray_address is None
        self._opened: Future[RayReplicas] = Future()
        self._closed, self._closing = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def open(
        self,
        config: EngineConfig,
        options: ServerConfig,
        names: tuple[str, ...],
        progress: Callable[[str, int, int], None],
    ) -> RayReplicas:
        """Start the replicas. Returns when the first is there. Raises HybridError."""
        progress("starting replicas", 0, self._cluster.replicas)
        arguments = (config, options, names)
        self._thread = threading.Thread(target=self._live, args=arguments, name="hybrid-ray", daemon=True)
        self._thread.start()
        return self._opened.result()

    def close(self) -> None:
        """End the replicas, and what was started for them."""
        with self._closing:
            if self._closed.is_set() or self._thread is None:
                return
            import ray
            from ray import serve

            with suppress(Exception):  # a cluster that is gone has nothing left to end
                if ray.is_initialized():
                    serve.shutdown() if self._own else serve.delete(APP)
            ray.shutdown()  # or Ray's threads would be ended with the interpreter, in the midst of what they do
            self._closed.set()

    def _live(self, config: EngineConfig, options: ServerConfig, names: tuple[str, ...]) -> None:
        try:
            self._opened.set_result(self._open(config, options, names))
        except BaseException as error:
            self._opened.set_exception(_readable(error))
        self._closed.wait()

    def _open(self, config: EngineConfig, options: ServerConfig, names: tuple[str, ...]) -> RayReplicas:
        from ray import serve

        self._connect()
        serve.start(proxy_location="Disabled", logging_config=_LOGGING)
        handle = serve.run(
            deployment(config, options, self._cluster, names), name=APP, route_prefix=None, logging_config=_LOGGING
        )
        replicas = RayReplicas(handle, self.close)
        replicas.described = handle.broadcast("say", "described").results(timeout_s=_ASK_SECONDS)[0][1]
        return replicas

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unless it is wanted
        logging.getLogger("ray").setLevel(logging.ERROR)
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if self._own:
                cpus, size = len(probe().cpus), _OBJECT_STORE
                ray.init("local", num_cpus=cpus, object_store_memory=size, include_dashboard=False, **quiet)
            else:
                ray.init(self._cluster.ray_address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            where = f"reached at {self._cluster.ray_address}" if self._cluster.ray_address else "started here"
            raise HybridError(f"Ray cannot be {where}: {' '.join(str(error).split())[:200]}") from None


def deployment(config: EngineConfig, options: ServerConfig, cluster: ClusterConfig, names: tuple[str, ...]) -> Any:
    """The model as Ray Serve deploys it on the cluster that is connected to. Raises ConfigError."""
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    each = processors_each(machines, cluster.replicas, config.threads)
    counts: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.scales:
        counts = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.fewest,
                initial_replicas=max(1, cluster.fewest),
                max_replicas=cluster.replicas,
                target_ongoing_requests=config.max_batch,
                upscale_delay_s=cluster.scale_up_seconds,
                downscale_delay_s=cluster.scale_down_seconds,
                look_back_period_s=_look_back(cluster),
            )
        }
    made = serve.deployment(
        Worker,
        name=_MODEL,
        max_ongoing_requests=config.max_batch + options.max_queue,
        max_queued_requests=max(1, options.max_queue),
        ray_actor_options={"num_cpus": each, "runtime_env": {"env_vars": _variables()}},
        graceful_shutdown_timeout_s=options.drain_seconds + _DRAIN_MORE,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=_STARTS,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        **counts,
    )
    return made.bind(config, options_of(options), names, cluster.replicas)


def _look_back(cluster: ClusterConfig) -> float:
    """Seconds whose mean queue decides: short beside the delays, and never so short that a moment does."""
    return min(30.0, max(2.0, cluster.scale_up_seconds))


def _variables() -> dict[str, str]:
    """Of the environment what an engine reads when it is opened."""
    late = [setting.variable for setting in settings_of(EngineConfig) if setting.late]
    return {name: os.environ[name] for name in late if name in os.environ}


def _readable(error: BaseException) -> BaseException:
    """What an engine said that could not be opened elsewhere, without the ways that it took."""
    if isinstance(error, HybridError) or not isinstance(error, Exception):
        return error
    told = re.findall(r"hybrid\.errors\.(\w+): (.*)", str(error))
    if told:
        kind = getattr(hybrid.errors, told[-1][0], HybridError)
        return kind(told[-1][1]) if issubclass(kind, HybridError) else HybridError(told[-1][1])
    return HybridError(f"Ray Serve could not start the replicas: {' '.join(str(error).split())[-300:]}")
