"""Traces in the files of others: known by their content, read to the row, refused in one line that says where."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from routing import random_trace

from gpu_cache.errors import CacheError
from gpu_cache.trace import COLUMNS, Trace, calls, make_trace
from gpu_cache.traces import FORMATS, find_format, format_of, joined, known_format, read, sglang
from gpu_cache.traces.base import Sizes, Source, TraceFormat

OTHERS = Path(__file__).parent.parent / "traces" / "others"
WRITTEN = [known for known in FORMATS if known.write]
ALL = ("step", "sequence", "position", "layer", "rank", "expert", "score")
PLACES = ("position", "layer", "expert")
KEPT = {  # of a trace of one sequence, a prompt and tokens after it
    "csv": ALL,
    "parquet": ALL,
    "expert-choices": (),
    "route": ALL[:-1],
    "moe-trace": ALL[:-1],
    "moe-log": ALL[:-1],
    "policylang": ALL,
    "policylang-parquet": ALL,
    "npz": ("sequence", "position", "layer", "rank", "expert"),
    "fingerprints": ("sequence", "position", "layer", "rank", "expert", "score"),
    "libcachesim": (),
    "oracle-general": (),
}


def needs(known: TraceFormat) -> None:
    if known.name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow, of the extra [research]")


def written(known: TraceFormat, trace: Trace) -> bytes:
    assert known.write is not None
    file = io.BytesIO()
    known.write(file, trace, lambda done, total: None)
    return file.getvalue()


def again(data: bytes, **sizes: int) -> Trace:
    return read(io.BytesIO(data), "name", Sizes(**sizes))


def of_one_sequence() -> Trace:
    """A prompt of three tokens in one step, then four tokens; 3 layers of 8 experts, 2 for a token."""
    trace = random_trace(3, steps=7, layers=3, experts=8, top_k=2)
    step = np.maximum(trace.step - 2, 0)
    order = np.lexsort((trace.rank, trace.position, trace.layer, step))
    columns = {name: getattr(trace, name)[order] for name in COLUMNS} | {"step": step[order]}
    return make_trace(columns, 3, 8)


def by_token(trace: Trace) -> Trace:
    """Rows in the order of sequences, tokens and layers, for formats that lose steps."""
    order = np.lexsort((trace.rank, trace.layer, trace.position, trace.sequence))
    return make_trace({name: getattr(trace, name)[order] for name in COLUMNS} | {"step": np.zeros(len(order), int)})


def test_every_written_format_says_what_it_keeps() -> None:
    assert set(KEPT) == {known.name for known in WRITTEN}
    assert len({known.name for known in FORMATS}) == len(FORMATS)
    assert all(known.read or known.write for known in FORMATS)


@pytest.mark.parametrize("known", WRITTEN, ids=lambda known: known.name)
def test_what_is_written_is_known_by_its_content_and_read_again(known: TraceFormat) -> None:
    needs(known)
    trace = of_one_sequence()
    data = written(known, trace)
    assert find_format(Source(io.BytesIO(data), "")) is known
    found = again(data, layers=3, experts=8)
    first, second = (trace, found) if "step" in KEPT[known.name] else (by_token(trace), by_token(found))
    for name in KEPT[known.name]:
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("known", WRITTEN, ids=lambda known: known.name)
def test_calls_of_single_tokens_survive_every_format(known: TraceFormat) -> None:
    """What a replay sees, but for the order of ranks, where each token is a step."""
    needs(known)
    trace = random_trace(5, steps=6, layers=3, experts=8, top_k=2)
    found = again(written(known, trace), layers=3, experts=8)
    asked, seen = calls(trace), calls(found)
    assert [(step, layer, sorted(experts)) for step, layer, experts, _ in asked] == [
        (step, layer, sorted(experts)) for step, layer, experts, _ in seen
    ]


@pytest.mark.parametrize("name", ["route", "policylang", "npz", "fingerprints", "moe-trace", "expert-choices"])
def test_sequences_that_ran_together_are_written_one_after_the_other(name: str) -> None:
    trace = random_trace(7, steps=4, layers=2, experts=8, top_k=2, tokens=3)
    found = again(written(known_format(name), trace), experts=8)
    for sequence in range(3):
        of = [by_token(trace).expert[by_token(trace).sequence == sequence] for trace in (trace, found)]
        of = [np.sort(chosen.reshape(-1, 2), axis=1) for chosen in of]
        assert np.array_equal(*of)
    assert (np.diff(found.sequence) >= 0).all() and len(np.unique(found.step)) == 12


def test_choices_have_an_empty_line_for_a_prompt_and_between_sequences() -> None:
    two = joined([of_one_sequence(), random_trace(3, steps=2, layers=3, experts=8, top_k=2)], ["a", "b"])
    lines = written(known_format("expert-choices"), two).decode().splitlines()
    assert lines[0] == "Index,Block_0,Block_0,Block_1,Block_1,Block_2,Block_2"
    assert [line.split(",")[0] for line in lines[1:]] == [str(number) for number in range(8)]
    assert [number for number, line in enumerate(lines) if line.endswith(",,,,,,")] == [1, 6]
    trace = of_one_sequence()
    last = trace.expert[trace.position == 6].reshape(3, 2)
    assert lines[5] == "4," + ",".join(map(str, np.sort(last, axis=1).reshape(-1)))


def test_a_token_of_other_size_is_refused_by_formats_of_columns() -> None:
    trace = random_trace(1, steps=3, layers=2)
    columns = {name: getattr(trace, name)[:-1] for name in COLUMNS}
    short = make_trace(columns, trace.layers, trace.experts)
    for name in ("expert-choices", "moe-trace", "npz"):
        with pytest.raises(CacheError, match="choose another format"):
            written(known_format(name), short)


def test_traces_are_joined_and_numbered_on() -> None:
    one, other = random_trace(1, steps=3, tokens=2), random_trace(2, steps=2)
    both = joined([one, other], ["a", "b"])
    assert sorted(set(both.sequence.tolist())) == [0, 1, 2] and sorted(set(both.step.tolist())) == [0, 1, 2, 3, 4]
    assert len(both) == len(one) + len(other)
    columns = {name: getattr(other, name) for name in COLUMNS}
    later = make_trace({**columns, "step": other.step + 5}, other.layers, other.experts)
    assert (joined([one, later], ["a", "b"]).step == both.step).all()
    with pytest.raises(CacheError, match="not of one model.*a 3, b 2"):
        joined([one, random_trace(1, layers=2)], ["a", "b"])


def test_a_route_of_bigmoeonedge() -> None:
    """Two decoded tokens."""
    trace = read((OTHERS / "bigmoeonedge.route.csv").open("rb"), "route.csv")
    assert (trace.layers, trace.experts, len(trace)) == (48, 128, 2 * 48 * 6)
    assert trace.position[::288].tolist() == [28, 29] and trace.step[::288].tolist() == [0, 1]
    assert trace.expert[0] == 60 and trace.score[0] == np.float32(0.215444)


def test_passes_of_a_route_begin_where_layers_do() -> None:
    header = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
    rows = ["0,0,0,1", "0,0,1,1", "0,0,0,2", "0,0,1,2", "0,1,2,1", "0,1,2,2", "1,0,0,1", "1,0,0,2"]
    text = header + "".join(f"{row},0,{number},nan,0,0\n" for number, row in enumerate(rows))
    trace = again(text.encode())
    assert trace.step.tolist() == [0, 0, 0, 0, 1, 1, 2, 2] and trace.layer.tolist() == [0, 0, 1, 1, 0, 1, 0, 1]
    assert trace.sequence.tolist() == [0] * 6 + [1] * 2 and set(trace.score.tolist()) == {1.0}


def test_fingerprints_are_tokens_of_a_sequence() -> None:
    trace = read((OTHERS / "fingerprint_examples.json").open("rb"), "x.json")
    assert (trace.layers, trace.experts, len(trace)) == (24, 32, 3 * 24 * 4)
    assert trace.position[::96].tolist() == [198, 199, 200] and trace.step[::96].tolist() == [0, 1, 2]
    assert trace.expert[:4].tolist() == [31, 21, 22, 6] and trace.score[0] == np.float32(0.494140625)


def test_a_record_of_sglang_of_every_token() -> None:
    """The dense layer is left out, slots are experts, and sequences go on where positions do."""
    trace = read((OTHERS / "sglang_per_token.pt").open("rb"), "x.pt")
    assert (trace.layers, trace.experts, len(trace)) == (2, 8, 11 * 2 * 2)
    first = trace.layer == 0
    assert trace.expert[first].tolist() == [1, 4, 4, 2, 7, 5, 5, 3, 7, 6, 2, 3, 6, 3, 6, 0, 5, 6, 5, 2, 7, 0]
    assert trace.sequence[first][::2].tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 0, 1, 2]
    assert trace.position[first][::2].tolist() == [0, 1, 2, 3, 0, 1, 4, 2, 5, 3, 0]


@pytest.mark.parametrize("mode", ["per_pass", "stat"])
def test_a_record_of_sglang_of_counts_has_the_calls_of_every_pass(mode: str) -> None:
    whole = calls(read((OTHERS / "sglang_per_token.pt").open("rb"), "x.pt"))
    counted = calls(read((OTHERS / f"sglang_{mode}.pt").open("rb"), "x.pt"))
    assert [(step, layer, sorted(experts)) for step, layer, experts, _ in whole] == [
        (step, layer, sorted(experts)) for step, layer, experts, _ in counted
    ]
    assert [experts[0] for _, _, experts, _ in counted] == [2, 0, 6, 0, 5, 1]


def test_numbers_that_are_cut_are_refused() -> None:
    old = (OTHERS / "sglang_stat.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(old)) as archive:
        member = next(name for name in archive.namelist() if name.endswith("data/0"))
        content = archive.read(member)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(old)) as archive, zipfile.ZipFile(file, "w") as new:
        for one in archive.infolist():
            new.writestr(one.filename, content[:-3] if one.filename == member else archive.read(one))
    with pytest.raises(CacheError, match=r"data/0 has \d+ bytes, no whole numbers; copy it again"):
        again(file.getvalue())


def test_slots_without_an_expert_are_not_counted_for_the_last_one(monkeypatch) -> None:
    """A map has -1 for them."""
    logical, table = np.array([[0, 1, 2, -1], [0, 1, 2, 3]]), np.ones((2, 4), np.int64)
    opened = SimpleNamespace(array=lambda value: value)
    columns = sglang._of_passes(opened, [{sglang._PER_PASS: table}], logical, Source(io.BytesIO(), "x.pt"))
    assert len(columns["expert"]) == 7


def test_positions_that_were_computed_again_keep_their_rows() -> None:
    """As after a rewind: 0, 1, 2, then 1, 2, 3."""
    trace = random_trace(4, steps=6, layers=2, experts=8, top_k=2)
    columns = {name: getattr(trace, name) for name in COLUMNS}
    columns |= {"position": np.array([0, 1, 2, 1, 2, 3])[trace.step], "sequence": np.zeros_like(trace.sequence)}
    rewound = make_trace(columns, trace.layers, trace.experts)
    found = again(written(known_format("npz"), rewound), experts=8)
    assert len(found) == len(rewound) == 24 and (found.expert == rewound.expert).all()


def repacked(program: bytes) -> bytes:
    """A file of torch with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(OTHERS / "sglang_stat.pt") as old, zipfile.ZipFile(file, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, program if member.filename.endswith("data.pkl") else old.read(member))
    return file.getvalue()


class Shell:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/tmp/should-never-be"),))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (pickle.dumps(Shell(), 2), "needs the function"),
        (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "needs the function os system"),
        (b"\x80\x02cos\nsystem\n)\x81.", "needs the instruction NEWOBJ"),
        (b"\x80\x02}X\x07\x00\x00\x00recordsq\x00]s.", "no list of passes"),
        (b"\x80\x02]q\x00h\x00a.", "neither records nor"),
        (b"\x80\x02}", "no whole file"),
        (b"\x80\x02R.", "no whole file"),
        (b"\x80\x02(.", "neither records nor"),
    ],
)
def test_nothing_of_a_file_of_torch_is_run(program: bytes, words: str) -> None:
    with pytest.raises(CacheError, match=words) as error:
        again(repacked(program))
    assert "\n" not in str(error.value)


def npy(ids: list[object], dtype: str = "uint8") -> str:
    file = io.BytesIO()
    np.save(file, np.array(ids, dtype))
    return base64.b64encode(file.getvalue()).decode()


PROMPT, ANSWER = [[[1, 2], [3, 4]], [[5, 6], [7, 0]]], [[[2, 1], [4, 3]]]
PACKED = {"dtype": "int16", "shape": [3, 2, 2], "data": base64.b64encode(np.array(PROMPT + ANSWER, "i2")).decode()}
USAGE = {"usage": {"prompt_tokens": 2}}


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"routed_experts": ANSWER}], "prompt_routed_experts": PROMPT},
        {"choices": [{"routed_experts": npy(PROMPT + ANSWER)}], **USAGE},
        {"choices": [{"routed_experts": PACKED}], **USAGE},
        {
            "meta_info": {
                "routed_experts": base64.b64encode(np.array(PROMPT + ANSWER, "<i4")).decode(),
                "prompt_tokens": 2,
                "completion_tokens": 2,
            }
        },
    ],
)
def test_answers_of_servers(answer: dict[str, object]) -> None:
    """Every way in which the experts of a prompt of two tokens and of one after it are said; several answers, too."""
    layers = {"layers": 2} if "meta_info" in answer else {}
    trace = again(json.dumps(answer).encode(), **layers)
    assert trace.expert.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 2, 1, 4, 3]
    assert trace.step.tolist() == [0] * 8 + [1] * 4 and trace.position[::4].tolist() == [0, 1, 2]
    for several in (json.dumps([answer, answer]), json.dumps(answer) + "\n" + json.dumps(answer) + "\n"):
        two = again(several.encode(), **layers)
        assert two.sequence.tolist() == [0] * 12 + [1] * 12 and two.step[12:].tolist() == [2] * 8 + [3] * 4


def test_tokens_of_a_prefix_that_was_cached_are_left_out() -> None:
    """-1 stands for them, and for layers without experts."""
    ids = [[[-1, -1], [-1, -1]], [[-1, -1], [3, 1]], [[-1, -1], [2, 0]]]
    trace = again(json.dumps({"choices": [{"routed_experts": ids}]}).encode())
    assert trace.layers == 1 and trace.position.tolist() == [1, 1, 2, 2] and trace.expert.tolist() == [3, 1, 2, 0]


MOE_TRACE = "-3,1,5,2\n-2,1,4,1\n-1,1,0,3\n-1,2,6,7\n0,1,1,2\n0,2,3,4\n1,1,5,6\n1,2,7,0\n"


def test_a_trace_of_llama_moe_trace() -> None:
    """Layers of the model; the last layer of a prompt has its last token alone; joined files are sequences."""
    trace = again((MOE_TRACE * 2).encode())
    one = trace.sequence == 0
    assert (trace.layers, trace.experts) == (2, 8) and len(trace) == 32 and one.sum() == 16
    assert trace.position[one][::2].tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
    assert trace.step[one][::2].tolist() == [0, 0, 0, 0, 1, 1, 2, 2] and trace.step[~one].min() == 3
    assert trace.position[~one].tolist() == trace.position[one].tolist()


def test_a_log_of_routing() -> None:
    text = "".join(f"blk.{layer}.ffn_gate_exps.weight {layer} 7\n" for layer in (1, 1, 2, 2, 1, 2))
    trace = again(text.encode() + b"blk.1.ffn_gate_exps.weight 3 -1\n")
    assert trace.step[::2].tolist() == [0, 0, 0, 0, 1, 1, 2] and trace.position[::2].tolist() == [0, 1, 0, 1, 2, 2, 3]
    assert trace.expert.tolist()[-3:] == [2, 7, 3]


def test_a_log_of_hits_says_what_it_lacks() -> None:
    log = b"llama_moe_cache: ubatch <= 8: hits = 30, misses = 10, hit rate = 75.00%, uploaded = 3.00 MiB\n"
    with pytest.raises(CacheError, match="30 hits of 40 .* names no experts.*llama-moe-trace"):
        again(b"main: build = 1\n" + log)


def test_next_accesses_are_those_of_the_same_key() -> None:
    trace = random_trace(2, steps=30, layers=2)
    data = np.frombuffer(
        written(known_format("oracle-general"), trace), [("t", "<u4"), ("o", "<u8"), ("s", "<u4"), ("n", "<i8")]
    )
    keys = data["o"].tolist()
    assert keys == calls(trace).key.tolist() and set(data["s"].tolist()) == {1}
    for at, ahead in enumerate(data["n"].tolist()):
        after = [later for later in range(at + 1, len(keys)) if keys[later] == keys[at]]
        assert ahead == (after[0] + 1 if after else -1)


HEADER = '{"num_layers": 2, "num_experts": 8, "top_k": 2}\n'
CHOICES = "Index,Block_0,Block_0\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\1\2\3", "no trace of a known format.*hybrid trace formats"),
        (b"[]", "no trace of a known format"),
        (b'{"a": 1}', "no trace of a known format"),
        (b"PK\x03\x04", "no trace of a known format"),
        (b"# route_trace v1\nturn,step\n0,1\n", "no column layer, slot, expert, weight"),
        (b"turn,phase,step,layer,slot,expert,weight\n", "no rows"),
        (b"turn,phase,step,layer,slot,expert,weight\n0,1,1,0,0,x,1\n", "'x'"),
        (b"# route_trace n_expert=8\nturn,phase,step,layer,slot,expert,weight\n0,1,1,0,0,8,1\n", "unknown expert 8"),
        (b"0,0,1\n0,0,1,2\n", "whole trace"),
        (b"blk.1.ffn_gate_exps.weight 1 2\nother\n", "line 2 is 'other'"),
        (b"blk.1.ffn_gate_exps.weight 1 2\nblk.2.ffn_gate_exps.weight 1\n", "line 2 has 1 experts"),
        (b"blk.1.ffn_gate_exps.weight 1 99999\n", "line 1 .*99999"),
        (CHOICES.encode() + b"0,1,1.5\n", "line 2 .*'1.5'"),
        (HEADER.encode() + b"{}\n", "line 2 is '{}'"),
        (HEADER.encode() + b'{"t": 0, "l": 0, "e": [1, 8]}\n', "line 2 has the unknown expert 8"),
        (HEADER.encode() + b'{"t": 0, "l": -1, "e": [1]}\n', "line 2 has the unknown layer -1"),
        (HEADER.encode() + b'{"t": 0, "l": 0, "e": [1.5]}\n', "line 2 has what is no number"),
        (HEADER.encode() + b'{"t": 0, "l": 0, "e": [1], "s": [0.5, 1]}\n', "1 experts and 2 scores"),
        (HEADER.encode() + b'{"t": 0, "l": 0, "e": [1], "s": ["a"]}\n', "line 2 has what is no number"),
        (HEADER.replace("8", '"a"').encode() + b"{}\n", "line 1 has num_experts 'a'"),
        (b'{"router_data": [{"token_0": {"layer_x": {}}}]}', "token 0 has .*layer_x"),
        (b'{"router_data": [{"token_0": {"layer_0": {"selected_experts": 1}}}]}', "token 0 has no list"),
        (b'{"router_data": []}', "no rows"),
        (b'{"a": {"think_expert_analytics": {}}}', "no router_data, only means"),
        (b'{"choices": [{"routed_experts": null}]}', "answer 0 has no routed_experts; start the server"),
        (b'{"choices": [{"routed_experts": [[1]]}]}', "answer 0 .*shape"),
        (b'{"choices": [{"routed_experts": "###"}]}', "answer 0 .*base64"),
        (b'{"choices": [{"routed_experts": {"data": "AAA=", "dtype": "int16", "shape": [1, 1, 2]}}]}', "2 bytes"),
        (b'{"meta_info": {}}', "answer 0 has no text"),
        (b'{"meta_info": {"routed_experts": "AAAA", "prompt_tokens": 1, "completion_tokens": 1}}', "--layers N"),
        (b"time,object,size\n0,1,1\n", "--experts N"),
        (b"\x93NUMPY\x01\x00", "no whole array"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(CacheError, match=words) as error:
        again(data)
    assert "\n" not in str(error.value) and str(error.value).startswith("name")


def test_arrays_that_claim_more_than_they_have_are_refused() -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (1 << 40, 48, 8)})
    with pytest.raises(CacheError, match="for the shape"):
        again(b"".join([file.getvalue(), b"\0" * 64]))
    floats = io.BytesIO()
    np.save(floats, np.zeros((1, 2, 3)))
    with pytest.raises(CacheError, match="whole numbers"):
        again(floats.getvalue())


def test_a_pipe_that_gives_little_at_a_time_is_read() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 7) if size is None or size > 0 else 7)

    data = written(known_format("route"), of_one_sequence())
    assert format_of(Source(Slow(data), "")).name == "route"
    assert len(read(Slow(data), "pipe")) == len(of_one_sequence())
