"""hybrid as an application of Ray Serve, on a Ray cluster that is there already; `docs/server.md`, Replicas.

In the folder of this file, on a machine of the cluster:

    serve run ray_serve:app model_path=/models/qwen3 replicas=4 min_replicas=1

or, for good, with `ray_serve.yaml` adapted:

    serve deploy ray_serve.yaml
"""

from hybrid.cluster.ingress import app

__all__ = ["app"]
