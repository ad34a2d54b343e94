"""Text streams: whole characters, no part of a stop string, and pieces that join to the final text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from dummy_tokenizer import BYTES, SPECIAL, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, processors

from hybrid.errors import HybridError, RequestError
from hybrid.text.detokenizer import StopMatcher, StreamDecoder, TextStream
from hybrid.text.tokenizer import Tokenizer, load_tokenizer, read_eos_ids

TEXTS = st.text(st.one_of(st.sampled_from("ab \n,é你好🙂👩‍👩‍👧\ufffd"), st.characters(exclude_categories=["Cs"])))


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Metaspace words and single-byte fallback, as Llama 2 has them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁▁"]
    backend = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


PIECES = Tokenizer(sentencepiece_like())


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(token) for token in tokens] + [decoder.finish()]


@given(st.lists(st.integers(0, 259), max_size=120))
def test_pieces_join_to_the_decoded_text_even_for_garbage(tokens: list[int]) -> None:
    assert "".join(streamed(BYTES, tokens)) == BYTES.decode(tokens)


@given(TEXTS)
def test_no_piece_holds_half_a_character(text: str) -> None:
    tokens = BYTES.encode(text)
    assert BYTES.decode(tokens) == text
    pieces = streamed(BYTES, tokens)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(st.lists(st.sampled_from(["▁", "▁a", "b", "▁▁", *"你好🙂é"]), max_size=60))
def test_sentencepiece_spaces_and_bytes_stream_right(parts: list[str]) -> None:
    tokens = []
    for part in parts:
        fallback = [PIECES.token_id(f"<0x{byte:02X}>") for byte in part.encode()]
        tokens += [PIECES.token_id(part)] if PIECES.token_id(part) is not None else fallback
    pieces = streamed(PIECES, tokens)
    assert "".join(pieces) == "".join(parts).replace("▁", " ").removeprefix(" ")
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.sampled_from(["▁", "▁a", "b", "▁▁"]), max_size=40), st.integers(0, 40))
def test_a_prompt_and_its_pieces_are_the_text_of_all_tokens(words: list[str], cut: int) -> None:
    tokens = [id for word in words if (id := PIECES.token_id(word)) is not None]
    stream = TextStream(PIECES, (), tokens[:cut])
    pieces = "".join(stream.push(token) for token in tokens[cut:]) + stream.finish()
    assert PIECES.decode(tokens[:cut]) + pieces == PIECES.decode(tokens)


@given(TEXTS.filter(lambda text: "\ufffd" not in text), st.integers(0, 40))
def test_pieces_begin_with_the_character_that_a_prompt_ends_within(text: str, cut: int) -> None:
    tokens = BYTES.encode(text)
    stream = TextStream(BYTES, (), tokens[:cut])
    pieces = "".join(stream.push(token) for token in tokens[cut:]) + stream.finish()
    assert BYTES.decode(tokens[:cut]).rstrip("\ufffd") + pieces == text


def test_the_space_after_a_prompt_and_the_character_that_it_ends_within() -> None:
    word, space = 258, 260  # "▁a", "▁▁"
    assert TextStream(PIECES, (), [word]).push(word) == " a"
    assert TextStream(PIECES, ()).push(word) == "a"
    assert TextStream(PIECES, (), [word] * 100).push(space) == "  "
    half = TextStream(BYTES, (), [0x61, 0xE4])
    assert [half.push(token) for token in (0xBD, 0xA0, 0x62)] == ["", "你", "b"]
    assert TextStream(BYTES, (), BYTES.encode("a\ufffd"), whole=True).push(0x62) == "b"


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    assert streamed(BYTES, list("é你".encode()) + [SPECIAL]) == ["", "é", "", "", "你", "", ""]
    assert streamed(BYTES, [0x61, 0xE4, 0xBD]) == ["a", "", "", "\ufffd"]


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    assert len("".join(streamed(BYTES, [0x80] * 40)[:-1])) >= 37


@pytest.mark.parametrize("tokens", [[0x61], [0x80], [SPECIAL], [0xE4, 0xBD, 0xA0]])
def test_a_push_decodes_a_bounded_window(tokens: list[int]) -> None:
    class Counting:
        specials = BYTES.specials
        longest = 0

        def decode(self, token_ids: list[int]) -> str:
            self.longest = max(self.longest, len(token_ids))
            return BYTES.decode(token_ids)

    counting = Counting()
    decoder = StreamDecoder(counting)
    for token in tokens * 500:
        decoder.push(token)
    assert counting.longest <= 65


def naive_cut(text: str, stops: list[str]) -> str:
    """Read character by character, and stop at the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


STOPS = st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3)


@given(st.text("ab🙂", max_size=40), STOPS, st.data())
def test_stop_strings_cut_the_same_text_however_it_is_split(text: str, stops: list[str], data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    matcher, passed = StopMatcher(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        passed += matcher.push(text[start:end])
        assert naive_cut(text, stops).startswith(passed)
    assert passed + matcher.finish() == naive_cut(text, stops)
    assert matcher.stopped == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["###", "#a"])
    assert [matcher.push(piece) for piece in ("x#", "y", "##", "z#", "#")] == ["x", "#y", "", "##z", ""]
    assert matcher.finish() == "##" and not matcher.stopped


@settings(max_examples=200)
@given(TEXTS, st.lists(st.text("ab🙂é\n", min_size=1, max_size=3), max_size=3))
def test_a_text_stream_joins_to_the_cut_text(text: str, stops: list[str]) -> None:
    stream = TextStream(BYTES, stops)
    joined = ""
    for token in BYTES.encode(text):
        joined += stream.push(token)
        if stream.stopped:
            break
    assert joined + stream.finish() == naive_cut(text, stops)


def marked(text: str, stops: list[str], shown: tuple[str, ...] = ()) -> tuple[str, bool]:
    """Streams a text whose every <end> is the special token."""
    stream = TextStream(BYTES, stops, shown=dict.fromkeys(shown, "<END>"))
    tokens = BYTES.encode(text)
    joined = ""
    for token in tokens:
        joined += stream.push(token)
        if stream.stopped:
            break
    return joined + stream.finish(), stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "right"),
    [
        ("ab<end>c", ["<end>"], ("ab", True)),
        ("ab<end>c", ["b<end>c"], ("a", True)),
        ("ab<end>c", ["b<end>d"], ("abc", False)),
        ("ab<end>c", ["bc"], ("a", True)),  # what is not seen does not keep a stop string from matching
        ("ab<end>c", ["bc", "<end>x"], ("a", True)),
        ("ab<end><end>c", ["<end><end>"], ("ab", True)),
        ("ab<end>", ["end", "<end"], ("ab", False)),  # a special token is one thing
        ("a 你<end>", ["<end>"], ("a 你", True)),
    ],
)
def test_stop_strings_may_hold_special_tokens(text: str, stops: list[str], right: tuple[str, bool]) -> None:
    assert marked(text, stops) == right


def test_the_text_of_a_special_token_as_plain_text_stops_as_well() -> None:
    stream = TextStream(BYTES, ["<end>"])
    assert "".join(stream.push(token) for token in b"ab<end>c") == "ab" and stream.stopped


def test_special_tokens_that_are_wanted_are_shown() -> None:
    assert marked("a<end>b", [], ("<end>",)) == ("a<END>b", False)
    assert marked("a<end>b", ["<end>c"], ("<end>",)) == ("a<END>b", False)
    assert marked("a<end>b", ["<end>b"], ("<end>",)) == ("a", True)


def test_a_stop_string_that_the_last_held_character_completes_counts() -> None:
    stream = TextStream(BYTES, ["\ufffd"])
    assert stream.push(0xE4) == "" and not stream.stopped
    assert stream.finish() == "" and stream.stopped


def test_lone_surrogates_are_refused_with_their_place() -> None:
    with pytest.raises(RequestError, match=r"U\+D800.* character 3"):
        BYTES.encode("abc\ud800")


def write(directory: Path, **files: dict) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_the_post_processor_adds_its_tokens_unless_told_not_to(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing("<end> $0", special_tokens=[("<end>", SPECIAL)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config={"bos_token": {"content": "<end>"}}))
    assert tokenizer is not None and tokenizer.bos_id == SPECIAL
    assert tokenizer.encode("abc") == [SPECIAL, *b"abc"]  # neither cut nor padded
    assert tokenizer.encode("abc", special_tokens=False) == [*b"abc"]


def test_a_directory_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(tmp_path / "missing") is None
    assert read_eos_ids(tmp_path, None) == frozenset()


def test_slow_tokenizer_files_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    backend = byte_level()
    backend.model.save(str(tmp_path))
    write(tmp_path, config={"model_type": "gpt2"}, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("ab 你")) == "ab 你"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"model": 3}'])
def test_damaged_tokenizer_files_give_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(HybridError, match=r"tokenizer\.json") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_eos_comes_from_generation_config_then_config_then_tokenizer(tmp_path: Path) -> None:
    named = Tokenizer(byte_level(), eos_id=SPECIAL)
    assert read_eos_ids(tmp_path, named) == {SPECIAL}
    write(tmp_path, config={"text_config": {"eos_token_id": 6}})
    assert read_eos_ids(tmp_path, named) == {6}
    write(tmp_path, config={"eos_token_id": 7, "text_config": {"eos_token_id": 6}})
    assert read_eos_ids(tmp_path, BYTES) == {7}
    write(tmp_path, generation_config={"eos_token_id": [8, 9]})
    assert read_eos_ids(tmp_path, BYTES) == {8, 9}
    for none in (None, [], -1):
        write(tmp_path, generation_config={"eos_token_id": none})
        assert read_eos_ids(tmp_path, BYTES) == {7}
    for wrong in ("<end>", 2.0, [1, "x"], True):
        write(tmp_path, generation_config={"eos_token_id": wrong})
        with pytest.raises(HybridError, match="eos_token_id is"):
            read_eos_ids(tmp_path, BYTES)
