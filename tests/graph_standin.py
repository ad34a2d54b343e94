"""CUDA graphs without a GPU: what torch and Triton's interpreter are asked for is noted, and done again at the same
addresses.

As on a GPU, nothing that was captured has happened until it is replayed: what it makes is not a number till then. What
could not be captured there, because the host would have to wait for the device, is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

Noted = tuple[Callable[[], Any], dict[int, torch.Tensor]]  # an operation, and which of its results are new memory
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")  # for what the device computed


class StandInCapture:
    """See `hybrid.gpu.graphs.Capture`. captured: how many works; operations: of all of them."""

    def __init__(self) -> None:
        self.captured = self.operations = 0

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        noted: list[Noted] = []
        before = interpreter.GridExecutor.__call__

        def launch(executor: Any, *arguments: Any, **options: Any) -> None:
            noted.append((lambda: before(executor, *arguments, **options), {}))

        interpreter.GridExecutor.__call__ = launch
        try:
            with _Notes(noted):
                made = work()
        finally:
            interpreter.GridExecutor.__call__ = before
        self.captured += 1
        self.operations += len(noted)

        def replay() -> None:
            for again, results in noted:
                made_anew = _tensors(again())
                for index, old in results.items():
                    old.copy_(made_anew[index])

        return replay, made


class _Notes(TorchDispatchMode):
    def __init__(self, noted: list[Noted]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        name = operation.name().split("::")[1].split(".")[0]
        if name in WAITS or any(_is_mask(leaf) for leaf in tree_leaves(arguments) if name == "index"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if name.endswith("_") or "out" in options:  # writes to what is there: not before it is replayed
            self._noted.append((lambda: operation(*arguments, **options), {}))
            return arguments[0]
        made = operation(*arguments, **options)
        own = {leaf.untyped_storage().data_ptr() for leaf in _tensors((arguments, options))}
        outputs = enumerate(_tensors(made))
        results = {index: tensor for index, tensor in outputs if tensor.untyped_storage().data_ptr() not in own}
        if results:
            self._noted.append((lambda: operation(*arguments, **options), results))
        for tensor in results.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        return made


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool
