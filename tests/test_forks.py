"""A process that inherits an open model ends, and its parent goes on. Each script forks at one bad moment after the
other; a child that waits for what it does not have is ended by its alarm.
"""

from __future__ import annotations

import fcntl
import os

import pytest
from loop_rig import run_script

from hybrid.weights.pack import _locked_directory

HEAD = """
import gc, multiprocessing, signal, subprocess
import numpy as np, cpu_kernels
from hybrid import CacheConfig, EngineConfig
from hybrid.core import Batch
from hybrid.engine.engine import Engine
from hybrid.errors import HybridError
def fork(inside):
    if not (child := os.fork()):
        signal.alarm(60)
        inside()
        sys.exit(0)  # what is left is collected when the interpreter ends
    assert os.waitpid(child, 0)[1] == 0
row = np.zeros(1, np.int32)
def step(engine): return engine.forward(Batch(row, row, row, row))
def nothing(): pass
def refused(call):
    try: call()
    except (HybridError, RuntimeError) as error: assert 'fork' in str(error), error
    else: os._exit(1)
"""

ON_THREADS = """
print('while a stream runs, from threads too', flush=True)
stream = llm.stream('Once', S(max_tokens=1900, ignore_eos=True))
next(stream)
fork(nothing)
fork(stream.close)
forking = threading.Thread(target=fork, args=(lambda: (refused(lambda: llm.generate('x')), os._exit(0)),))
forking.start(); forking.join()
process = multiprocessing.get_context('fork').Process(target=refused, args=(lambda: llm.generate('x'),))
process.start(); process.join()
assert process.exitcode == 0
next(stream); stream.close()

print('an engine alone', flush=True)
engine = Engine.open(EngineConfig(threads=2))
step(engine)
def use_engine():
    refused(lambda: step(engine))
    refused(lambda: engine._executor.step(row, row, row, row, engine._logits[:1]))
    refused(lambda: cpu_kernels.phase_seconds(engine.pool, 1))
    engine.close(); engine.close(); engine.cancel()
fork(nothing); fork(use_engine)
step(engine)

print('garbage that a child collects before it becomes another program', flush=True)
class Cycle: pass
gc.disable()
cycle = Cycle()
cycle.itself, cycle.engine = cycle, engine
del cycle, engine
def collect(): signal.alarm(60); gc.collect()
assert subprocess.run(['true'], preexec_fn=collect).returncode == 0
gc.enable()
llm.generate('Once', S(max_tokens=1)); llm.close()

print('inside a step', flush=True)
with LLM(threads=2, routes=True) as llm:
    children = []
    def fork_inside(*args):
        llm.engine.routes.observer = None
        if child := os.fork(): children.append(child)
        else: signal.alarm(60)
    llm.run(lambda: setattr(llm.engine.routes, 'observer', fork_inside))
    llm.generate('Once', S(max_tokens=2))
    assert os.waitpid(children[0], 0)[1] == 0
    llm.generate('Once', S(max_tokens=2))
"""

WITH_A_DEVICE = """
llm.close()
parts = dict(threads=2, device='simulated', cache=CacheConfig(2, 2))
def mine():
    with LLM(**parts) as llm: assert llm.generate('Once', S(max_tokens=2))[0].text
print('a child opens a model of its own: its threads have the places of those that are gone', flush=True)
with LLM(**parts) as other:
    engine = Engine.open(EngineConfig(**parts))
    step(engine); other.generate('Once', S(max_tokens=1))
    fork(nothing); fork(engine.close); fork(mine)
    other.generate('Once', S(max_tokens=1)); step(engine)
"""


@pytest.mark.parametrize("script", [ON_THREADS, WITH_A_DEVICE], ids=["on threads", "with a device"])
def test_a_child_ends_and_its_parent_goes_on(script: str) -> None:
    result = run_script(f"{HEAD}{script}\nprint('fine')")
    assert result.stdout.endswith("fine\n") and not result.returncode, result.stdout + result.stderr


def test_a_child_does_not_keep_the_lock_of_a_store_that_is_packed(tmp_path) -> None:
    read, write = os.pipe()
    with _locked_directory(tmp_path / "store", tmp_path, lambda line: None):
        if not (child := os.fork()):  # as multiprocessing does in another thread
            os.close(write)
            os.read(read, 1)  # lives until the test is over
            os._exit(0)
        (tmp_path / "store" / "shard.tmp").touch()
    store = os.open(tmp_path / "store", os.O_RDONLY)
    fcntl.flock(store, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError if the child had it
    os.close(store)
    os.close(write)
    os.waitpid(child, 0)
