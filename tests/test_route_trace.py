"""Runs whose experts a trace names: what goes in comes out, in every kind of step, and nothing else is different."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS
from cuda_rig import put
from steps import open_engine, step
from test_hybrid_steps import all_work, bits, work
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from seed_geometries import Shape, made_up_trace, main  # noqa: E402

from gpu_cache.admission import Costs  # noqa: E402
from gpu_cache.simulator import Setting, replay  # noqa: E402
from gpu_cache.trace import COLUMNS, Trace, calls  # noqa: E402
from hybrid.commands import run as commands
from hybrid.config import CacheConfig, EngineConfig  # noqa: E402
from hybrid.engine.engine import Engine  # noqa: E402
from hybrid.errors import ConfigError, KernelError  # noqa: E402
from hybrid.files.traces import open_trace, read_trace, write_trace  # noqa: E402
from hybrid.models import model_spec  # noqa: E402
from hybrid.models.layers.feed_forward import TAKE  # noqa: E402
from hybrid.plan.resolve import EMBEDDED_MODEL, plan_model  # noqa: E402
from hybrid.plan.route_trace import read_route_trace  # noqa: E402
from hybrid.plan.text import plan_text
from hybrid.weights.pack import model_config  # noqa: E402

EMBEDDED: dict[str, Any] = {"threads": 2, "max_batch": 4, "chunk_size": 64, "max_seq_len": 256}
SHAPE, LENGTH = Shape(16, 16, 2), 40  # of the embedded model; positions of each of two sequences
SPEC = model_spec(model_config(EMBEDDED_MODEL))
CACHES = [
    CacheConfig(14, 4, poison=True),
    CacheConfig(16, 16, poison=True, delay=0),
    CacheConfig(1, 2, stream="on", poison=True, delay=0),
    CacheConfig(14, 4, quota=2, policy="SIEVE", admission="break-even", mapping="hash", stream="on", delay=3),
    CacheConfig(14, 4, mode="auto"),
]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """More would wait for the processors on which the threads of the executor spin."""
    if find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made_up() -> Trace:
    return made_up_trace(SHAPE, 0.6, 2, LENGTH)


@pytest.fixture(scope="module")
def path(made_up, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "made_up.csv"
    write_trace(path, made_up)
    return path


def embedded(**choices: Any) -> Engine:
    return Engine.open(EngineConfig(**EMBEDDED, **choices))


def run(engine: Engine) -> np.ndarray:
    """Logits of two prompts, one in chunks, of their tokens, of a rewind, and of a third prompt in the first's slot."""
    a, b, c = np.random.default_rng(1).integers(0, engine.spec.vocab, (3, 64))
    found = [step(engine, (0, 0, a[:9])), step(engine, (0, 9, a[9:30]), (2, 0, b[:43]))]
    found += [step(engine, (0, 30 + i, a[30 + i :][:1]), (2, 43 + i, b[43 + i :][:1])) for i in range(6)]
    found += [step(engine, (0, 20, c[20:34])), step(engine, (0, 34, c[34:35]))]
    found += [step(engine, (2, 49, b[49:50]), (0, 0, c[:33])), step(engine, (0, 33, c[33:34]))]
    engine.release(0)
    engine.release(2)
    return np.concatenate(found)


def rows_of_run() -> list[tuple[int, int]]:
    """(sequence, position) of every row of it."""
    rows = [(0, p) for p in range(9)] + [(0, p) for p in range(9, 30)] + [(1, p) for p in range(43)]
    rows += [row for i in range(6) for row in ((0, 30 + i), (1, 43 + i))]
    rows += [(0, p) for p in range(20, 35)] + [(1, 49)] + [(2, p) for p in range(34)]
    return rows


class Recorder:
    """rows: (sequence, position) of every row; experts: [MoE layers, rows, top_k]; scores alike."""

    def __init__(self, engine: Engine) -> None:
        self.rows: list[tuple[int, int]] = []
        self._layers: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in engine.spec.layers]
        engine.routes.observer = self

    def __call__(
        self, number: int, layer: int, sequence: Any, position: Any, ids: Any, scores: Any, named: Any
    ) -> None:
        if layer == 0:
            self.rows += zip(sequence.tolist(), position.tolist(), strict=True)
        self._layers[layer].append((ids.copy(), scores.copy()))

    def column(self, which: int) -> np.ndarray:
        return np.array([np.concatenate([told[which] for told in layer]) for layer in self._layers if layer])


def expected(trace: Trace, rows: list[tuple[int, int]]) -> np.ndarray:
    """[layers, rows, top_k]."""
    recorded = trace.expert.reshape(2, LENGTH, SHAPE.layers, SHAPE.top_k)
    return np.array([recorded[sequence % 2, position % LENGTH] for sequence, position in rows]).transpose(1, 0, 2)


def driven(path: Path, **choices: Any) -> tuple[np.ndarray, Recorder]:
    with embedded(routes=True, route_trace=path, **choices) as engine:
        recorder = Recorder(engine)
        logits = run(engine)
        if engine.experts:
            engine.experts.table.check_integrity()
        return logits, recorder


@pytest.fixture(scope="module")
def threads(path) -> np.ndarray:
    """Logits of a run that the trace drives, on the threads alone."""
    return driven(path)[0]


def assert_recorded(recorder: Recorder, trace: Trace) -> None:
    assert recorder.rows == rows_of_run()
    assert np.array_equal(recorder.column(0), expected(trace, recorder.rows))
    scores = recorder.column(1)
    assert (np.diff(scores) <= 0).all() and np.allclose(scores.sum(axis=2), 1, atol=1e-5)


def assert_near(logits: np.ndarray, wanted: np.ndarray) -> None:
    """Every row: no near-tie can send it to other experts."""
    errors = np.linalg.norm(logits - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert errors.max() < 0.05


@pytest.mark.parametrize("numa", ["off", "2"])
def test_a_trace_in_is_the_trace_out(path, made_up, threads, numa) -> None:
    logits, recorder = driven(path, numa=numa)
    assert_recorded(recorder, made_up)
    assert_near(logits, threads)


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_the_cache_takes_the_experts_of_the_trace_too(path, made_up, threads, cache) -> None:
    logits, recorder = driven(path, device="simulated", cache=cache)
    assert_recorded(recorder, made_up)
    assert np.array_equal(bits(logits), bits(threads))


@pytest.mark.parametrize("cache", [None, *CACHES[:3]], ids=str)
def test_a_step_on_a_device_takes_them_there(path, made_up, threads, cache) -> None:
    pytest.importorskip("torch")
    device = {} if cache is None else {"device": "simulated", "cache": cache}
    logits, recorder = driven(path, step_on="torch-cpu", **device)
    assert_recorded(recorder, made_up)
    assert_near(logits, threads)


@pytest.mark.parametrize("seed", range(2))
def test_copies_by_streams_change_nothing(path, made_up, threads, monkeypatch, seed) -> None:
    put(monkeypatch, seed=seed)
    logits, recorder = driven(path, device="cuda", cache=CACHES[0])
    assert_recorded(recorder, made_up)
    assert np.array_equal(bits(logits), bits(threads))


@pytest.mark.parametrize("graphs", [False, True])
def test_hits_that_are_found_on_the_device_are_those_of_the_trace(tmp_path, monkeypatch, graphs) -> None:
    """What a graph reads is renewed by every step."""
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("a test of stand-ins: here is a GPU")
    from gpu.test_step_experts import OnStandIn
    from graph_standin import StandInCapture

    trace, tokens = tmp_path / "trace.csv", np.arange(40) * 7 % 131
    write_trace(trace, made_up_trace(Shape(2, 10, 3), 0.5, 2, 12))
    model = write_checkpoint(tmp_path / "hf", "qwen3_moe")

    def work(engine: Engine) -> np.ndarray:
        found = [step(engine, (0, 0, tokens[:5]))]
        return np.concatenate(found + [step(engine, (0, i, tokens[i : i + 1])) for i in range(5, 10)])

    with open_engine(model, tmp_path / "cache", route_trace=trace, step_on="torch-cpu") as engine:
        wanted = work(engine)
    put(monkeypatch, compute=OnStandIn, step_device="cpu", room=10**10)
    if graphs:
        monkeypatch.setattr("hybrid.gpu.opening.capture_on", lambda device: StandInCapture())
    cache = CacheConfig(2, 6, delay=0, poison=True)
    with open_engine(
        model, tmp_path / "cache", route_trace=trace, routes=True, device="cuda", cache=cache, max_batch=1
    ) as engine:
        recorder = Recorder(engine)
        assert_near(work(engine), wanted)
        found = engine.routes.trace.routes(*np.array(recorder.rows, np.int32).T)
        assert np.array_equal(recorder.column(0), found)
        assert engine.experts.count()[:, 1].sum() > 0
        assert (engine.device_step.graphs.replayed > 0) == graphs


@pytest.mark.parametrize("step_on", ["threads", "torch-cpu"])
@pytest.mark.parametrize("policy", ["LRU", "LFU", "SIEVE"])
def test_the_simulator_counts_for_the_trace_what_the_engine_did(made_up, path, policy, step_on) -> None:
    """The file itself is replayed: its steps are tokens, and so are those of the engine."""
    if step_on == "torch-cpu":
        pytest.importorskip("torch")
    cache = CacheConfig(13, 4, 20, policy, delay=3, seed=5)
    with embedded(device="simulated", cache=cache, route_trace=path, step_on=step_on) as engine:
        for sequence in range(2):
            for position in range(LENGTH):
                step(engine, (sequence, position, np.array([position])))
        counts, costs = engine.experts.count(), engine.experts.costs
    setting = Setting(13, 4, policy, quota=20, delay=3, seed=5)
    result = replay(calls(made_up), setting, Costs(costs.copy, costs.cpu, costs.device))
    for name, found in zip(("calls", "hits", "loading", "misses", "evictions", "fills"), counts.T, strict=True):
        assert np.array_equal(found, getattr(result, name)), name
    assert counts[:, 1].sum() > 0


def recorded(engine: Engine, path: Path, work: Any) -> np.ndarray:
    with open_trace(path, pytest.fail) as writer:
        engine.routes.observer = writer.write
        return work(engine)


@pytest.mark.parametrize("step_on", ["threads", "torch-cpu"])
def test_a_models_own_trace_changes_no_bit(tmp_path, step_on) -> None:
    if step_on == "torch-cpu":
        pytest.importorskip("torch")
    sizes = {"threads": 2, "max_batch": 8, "chunk_size": 128, "max_seq_len": 256, "step_on": step_on}
    with Engine.open(EngineConfig(**sizes, routes=True)) as engine:
        wanted = recorded(engine, tmp_path / "own.csv", all_work)
    with Engine.open(EngineConfig(**sizes, route_trace=tmp_path / "own.csv")) as engine:
        assert np.array_equal(all_work(engine), wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_every_family_takes_them_dense_layers_between_or_not(tmp_path, family) -> None:
    model = write_checkpoint(tmp_path / "hf", family)

    def all_of(engine: Engine) -> np.ndarray:
        return bits(np.concatenate(list(work(engine, 3))))

    with open_engine(model, tmp_path / "cache", routes=True) as engine:
        wanted = recorded(engine, tmp_path / "own.csv", all_of)
    own, simulated = (
        {"route_trace": tmp_path / "own.csv"},
        {"device": "simulated", "cache": CacheConfig("auto", delay=0)},
    )
    for choices in (own, own | simulated):
        with open_engine(model, tmp_path / "cache", **choices) as engine:
            assert np.array_equal(all_of(engine), wanted)


def test_without_the_flag_steps_are_as_they_were(path) -> None:
    config = EngineConfig(**EMBEDDED, device="simulated", step_on="torch-cpu")
    plain, driven = (plan_model(replace(config, route_trace=trace)) for trace in (None, path))
    for name in ("ops", "placed_ops", "device_ops", "device_placed_ops"):
        left = [op for op in getattr(driven, name) if op.kind != "host" or op.arguments["call"].kind != TAKE]
        assert left == list(getattr(plain, name)), name
        took = len(getattr(driven, name)) - len(left)
        assert took == (0 if name.startswith("device") else SHAPE.layers), name
    assert plain.buffers == driven.buffers and plain.to_dict()["route_trace"] is None
    assert driven.to_dict()["route_trace"] == str(path) and f"routes: those of {path}" in plan_text(driven)


def cut(trace: Trace, keep: np.ndarray) -> Trace:
    return replace(trace, **{name: getattr(trace, name)[keep] for name in COLUMNS})


def test_more_layers_are_left_out_and_so_are_tokens_that_were_not_finished(tmp_path, path, made_up) -> None:
    wanted = read_route_trace(path, SPEC)
    more = made_up_trace(Shape(20, 16, 2), 0.6, 2, LENGTH)
    write_trace(tmp_path / "more.csv", more)
    found = read_route_trace(tmp_path / "more.csv", SPEC)
    assert found.experts.shape == wanted.experts.shape
    assert np.array_equal(found.experts.transpose(1, 0, 2).reshape(-1), more.expert[more.layer < 16])
    last = (made_up.sequence == 1) & (made_up.position == LENGTH - 1) & (made_up.layer > 3)
    write_trace(tmp_path / "cut.csv", cut(made_up, ~last))
    found = read_route_trace(tmp_path / "cut.csv", SPEC)
    assert np.array_equal(found.experts, wanted.experts[:, :-1])
    assert found.start.tolist() == [0, LENGTH, 2 * LENGTH - 1]


def test_of_a_token_that_was_recorded_twice_the_last_is_taken(tmp_path, made_up) -> None:
    again = replace(
        cut(made_up, made_up.position >= LENGTH - 3), expert=(made_up.expert[made_up.position < 3] + 1) % 16
    )
    again = replace(again, step=again.step + made_up.step[-1] + 1)
    both = {name: np.concatenate([getattr(made_up, name), getattr(again, name)]) for name in COLUMNS}
    write_trace(tmp_path / "twice.csv", replace(made_up, **both))
    found = read_route_trace(tmp_path / "twice.csv", SPEC)
    assert found.experts.shape == (16, 2 * LENGTH, 2)
    late = found.experts[:, LENGTH - 3 : LENGTH].transpose(1, 0, 2).reshape(-1)
    assert np.array_equal(late, again.expert[: len(late)])


def test_a_file_that_is_another_is_read_again(tmp_path) -> None:
    for seed in range(2):
        trace = made_up_trace(SHAPE, 0.5 + seed / 10, 1, 5 + seed)
        write_trace(tmp_path / "trace.csv", trace)
        assert read_route_trace(tmp_path / "trace.csv", SPEC).start[-1] == 5 + seed


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(15, 16, 2), "has 15 MoE layers, the model 16"),
        (Shape(16, 16, 3), "has experts of ranks 0 to 2 for a token, the model needs 0 to 1"),
        (Shape(16, 16, 1), "has experts of ranks 0 to 0 for a token, the model needs 0 to 1"),
        (Shape(16, 64, 2), "names expert 63, the model has 16 a layer"),
    ],
    ids=str,
)
def test_a_trace_of_another_shape_is_refused_before_anything_is_opened(tmp_path, monkeypatch, shape, words) -> None:
    monkeypatch.setattr("hybrid.engine.engine.cached_store", lambda *_: pytest.fail("the store was opened"))
    write_trace(tmp_path / "trace.csv", made_up_trace(shape, 0.5, 1, 40))
    with pytest.raises(ConfigError, match=words) as error:
        embedded(route_trace=tmp_path / "trace.csv")
    assert "\n" not in str(error.value) and str(tmp_path / "trace.csv") in str(error.value)


def test_what_is_no_trace_is_refused(tmp_path, made_up) -> None:
    def refuse(words: str, name: str = "trace.csv", **choices: Any) -> None:
        with pytest.raises(ConfigError, match=words):
            embedded(route_trace=tmp_path / name, **choices)

    refuse("--route-trace .*there is no such file")
    write_trace(tmp_path / "trace.csv", replace(made_up, expert=made_up.expert * 0 + 3))
    refuse("names expert 3 twice for a token in layer 0")
    write_trace(tmp_path / "trace.csv", cut(made_up, (made_up.layer + made_up.rank) % 17 > 0))
    refuse("has no token with all of 16 layers and 2 experts")
    (tmp_path / "trace.csv").write_text("step,sequence\n1,2\n")
    refuse("--route-trace .*has no column position")
    write_trace(tmp_path / "trace.csv", made_up)
    for device in ("cpu", "simulated"):
        refuse(
            "prefetch next-gate: the experts of the trace are not those of the routers",
            device=device,
            cache=CacheConfig(prefetch="next-gate"),
        )
    with pytest.raises(ConfigError, match="model_type 'llama' has no experts"):
        read_route_trace(tmp_path / "trace.csv", model_spec(CONFIGS["llama"]))


@pytest.mark.parametrize("part", [(4, 0), (0, 256), (-1, 0)], ids=str)
def test_a_step_beyond_the_plan_is_still_refused_by_name(path, part) -> None:
    with embedded(route_trace=path) as engine, pytest.raises(KernelError, match="step refused"):
        step(engine, (*part, np.array([1])))


def test_the_command_says_whose_experts_it_takes_and_records_them(tmp_path, path, made_up) -> None:
    out = tmp_path / "out.csv"
    arguments = ["--prompt", "Once upon a time", "--max-tokens", "8", "--threads", "1", "--ignore-eos", "--json"]
    made = CliRunner().invoke(commands.app, [*arguments, "--route-trace", str(path), "--trace", str(out)])
    assert made.exit_code == 0, made.stderr
    assert f"note: experts are those of {path}, not of the model's routers: texts mean nothing\n" in made.stderr
    assert json.loads(made.stdout)["plan"]["route_trace"] == str(path)
    found = read_trace(out)
    rows = max(found.position.tolist()) + 1
    assert rows > 8 and np.array_equal(found.sequence, np.zeros(len(found)))
    order = np.lexsort((found.rank, found.layer, found.position))
    assert np.array_equal(found.expert[order], made_up.expert[: rows * SHAPE.layers * SHAPE.top_k])


@pytest.mark.parametrize(("model", "reuse"), [("embedded", 0.5), ("4x32x4", 0.3), ("3x128x8", 0.7)])
def test_made_up_routing_is_written_with_the_reuse_that_was_asked_for(tmp_path, model, reuse) -> None:
    path = tmp_path / "trace.csv"
    main(["--write-trace", str(path), "--model", model, "--reuse", str(reuse), "--tokens", "300", "--sequences", "2"])
    trace = read_trace(path)
    top_k = int(trace.rank.max()) + 1
    chosen = trace.expert.reshape(2, 300, trace.layers, top_k)
    again = (chosen[:, 1:, :, :, None] == chosen[:, :-1, :, None, :]).any(axis=4).mean()
    assert again == pytest.approx(reuse, abs=0.03) and len(set(trace.sequence.tolist())) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "4x2x3"], "'4x2x3' is unknown; allowed: mixtral"),
        (["--reuse", "0.1"], "--reuse 0.1 is out of range"),
    ],
)
def test_routing_that_cannot_be_made_up_is_refused(tmp_path, flags, words, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--write-trace", str(tmp_path / "trace.csv"), *flags])
    assert ended.value.code == 2 and words in capsys.readouterr().err
