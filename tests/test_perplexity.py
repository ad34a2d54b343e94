"""Windows over a text, and what the log probabilities of its tokens sum up to: as transformers has them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from dummy_engine import DummyEngine
from dummy_tokenizer import BYTES
from typer.testing import CliRunner

from hybrid import LLM
from hybrid.commands.perplexity import app
from hybrid.errors import KernelError, RequestError
from hybrid.serving.perplexity import Perplexity, Windows


@pytest.mark.parametrize(("tokens", "window", "stride"), [(2, 8, 3), (8, 8, 3), (9, 8, 7), (100, 8, 1), (41, 10, 4)])
def test_every_token_is_scored_once_behind_as_many_as_there_are(tokens: int, window: int, stride: int) -> None:
    windows = Windows(tokens, window, stride, 64)
    scored = [token for part in windows for token in range(part.scored, part.last)]
    assert scored == list(range(1, tokens))
    for part in windows:
        assert part.last - part.first <= window and part.first % stride == 0
        assert part.first == 0 or part.scored - part.first >= window - stride


def test_windows_that_cannot_be_are_refused() -> None:
    assert (Windows(9, None, None, 64).window, Windows(9, None, None, 64).stride) == (64, 32)
    assert Windows(9, None, None, 4096).window == 2048
    for given, line in (
        ((1, None, None, 64), "the text has 1 tokens"),
        ((9, 65, None, 64), "window is 65; it must be a whole number from 2 to 64"),
        ((9, 1, None, 64), "window is 1;"),
        ((9, 8, 8, 64), "stride is 8; it must be a whole number from 1 to 7"),
        ((9, 8, True, 64), "stride is True"),
    ):
        with pytest.raises(RequestError, match=line):
            Windows(*given)


def test_figures_are_those_of_the_sum() -> None:
    result = Perplexity(tokens=10, windows=1, window=16, stride=8, nats=10 * math.log(4), bytes=40)
    assert (result.perplexity, result.bits_per_token, result.bits_per_byte) == pytest.approx((4, 2, 0.5))
    assert Perplexity(1, 1, 2, 1, 1e6).perplexity == math.inf and Perplexity(1, 1, 2, 1, 1.0).bits_per_byte is None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted, dtype=np.float64).sum(-1, keepdims=True))


def test_scores_are_those_of_the_logits() -> None:
    tokens = [5, 9, 200, 7, 7, 30, 2, 8, 11, 12]  # more than a step of this engine holds
    with LLM.from_engine(DummyEngine()) as llm:
        logprobs = log_softmax(llm.logits(tokens))
        score = llm.score(tokens, top=3)
        assert score[0] is None and len(score) == len(tokens) and llm.score([]) == []
        for place, one in enumerate(score[1:], start=1):
            row = logprobs[place - 1]
            assert one.token_id == tokens[place] and one.logprob == pytest.approx(row[tokens[place]], abs=1e-5)
            assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:3].tolist()
        seen: list[tuple[int, int]] = []
        result = llm.perplexity(tokens, window=4, stride=2, progress=lambda *n: seen.append(n))
        assert seen == [(n, 4) for n in range(1, 5)] and result.tokens == 9 and result.bytes is None
        with pytest.raises(RequestError, match="top is -1"):
            llm.score(tokens, top=-1)
    with LLM.from_engine(DummyEngine(), BYTES) as llm:
        assert llm.perplexity("häb").bytes == 3  # behind the first byte-token


def test_what_is_no_number_is_no_perplexity() -> None:
    class Damaged(DummyEngine):
        def _write(self, *row) -> np.ndarray:
            return np.full(self.spec.vocab, np.nan, np.float32)

    with LLM.from_engine(Damaged()) as llm, pytest.raises(KernelError, match="tokens 1 to 2: its weights are damaged"):
        llm.perplexity([1, 2, 3])


def test_it_is_what_transformers_says(tmp_path) -> None:
    pytest.importorskip("torch")
    import oracle

    saved = oracle.save(tmp_path / "hf", "qwen3_moe", length=60)
    nats = []
    for first, scored, last in ((0, 1, 40), (20, 40, 60)):
        window = oracle.computed_logits(saved.path, saved.tokens[first:last], "fp32") if first else saved.exact[:last]
        logprobs = log_softmax(window)
        nats += [-logprobs[at - first - 1, saved.tokens[at]] for at in range(scored, last)]
    with LLM(saved.path, threads=1, max_seq_len=64, cache_dir=tmp_path / "cache") as llm:
        result = llm.perplexity(saved.tokens, window=40)
        assert (result.tokens, result.windows, result.stride) == (59, 2, 20)
        assert result.nats == pytest.approx(sum(nats), rel=0.01)
        one = [each.logprob for each in llm.score(saved.tokens) if each]
        exact = log_softmax(saved.exact)[np.arange(59), saved.tokens[1:]]
        assert np.abs(np.array(one) - exact).mean() < 0.05


def test_the_command_says_it_in_a_table_and_in_json(tmp_path) -> None:
    pytest.importorskip("cpu_kernels", exc_type=ImportError)
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little girl named Lily. She liked to play in the park.\n" * 3)

    def run(*arguments: object):
        return CliRunner().invoke(app, [str(text), "--threads", "1", *map(str, arguments)])

    table, report = run("--window", 32), json.loads(run("--window", 32, "--json").stdout)
    assert table.exit_code == 0, table.stderr
    assert [line.split("  ")[0] for line in table.stdout.splitlines()] == [
        "perplexity", "bits per token", "bits per byte", "scored", "windows",
    ]  # fmt: skip
    assert f"perplexity      {report['perplexity']:.4f}" in table.stdout and (report["window"], report["stride"]) == (
        32,
        16,
    )
    assert report["bits_per_byte"] * report["bytes"] == pytest.approx(report["bits_per_token"] * report["tokens"])
    for arguments, line in (
        (("--window", 4096), "--window 4096 is longer than the model's context of 2048 tokens"),
        (("--window", 8, "--stride", 8), "--stride 8 must be smaller than the window of 8 tokens"),
        (("--window", 1), "--window 1 is out of range"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "") and line in result.stderr
    text.write_bytes(b"")
    assert "is empty; give a text file" in run().stderr
    text.write_bytes(b"\xff")
    assert "is not valid UTF-8" in run().stderr
