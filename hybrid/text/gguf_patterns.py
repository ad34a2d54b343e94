"""How vocabularies of GGUF files cut a text into words before they merge: by the name in `tokenizer.ggml.pre`.

The patterns are those of the tokenizer.json files of the models that the names stand for.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _SPACES
_PHRASES = r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
_EXAONE_MOE = _CONTRACTIONS + _PHRASES + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(contractions: str, letters: str = "") -> str:
    """Words of capitals, then of small letters. letters: what classes of letters are cut down to."""
    upper, lower = (rf"[{kinds}{letters}]" for kinds in (_UPPER, _LOWER))
    before = r"[^\r\n\p{L}\p{N}]?"
    return rf"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}"


_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_GPT4O = _cased(f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}|" + _REST
_KIMI = r"\p{Han}+|" + _cased(f"{_CONTRACTIONS}?", r"&&[^\p{Han}]") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
TEKKEN = _cased("") + r"|\p{N}|" + _REST
_DIGITS = r"\p{N}"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    _PUNCTUATION + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
)
# Digits in threes from the last one on, and letters of scripts that are written without spaces.
_AFMOE = (
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
    _DEEPSEEK3[-1],
)
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK = (
    "[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _DEEPSEEK_HAN, r"\p{N}+",
)  # fmt: skip


@dataclass(frozen=True)
class Cutting:
    """patterns: each cuts what the ones before it have left. whole: a word that is a token is not merged, but taken.
    adds_bos: whether a text begins with a token of its own, where the file does not say.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    adds_bos: bool = False


_AS_LLAMA3 = Cutting((_LLAMA3,), whole=True, adds_bos=True)
_AS_GPT2, _AS_DIGITS, _AS_QWEN2 = Cutting((_GPT2,)), Cutting((_DIGITS, _GPT2)), Cutting((_QWEN2,))
CUTTINGS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), _AS_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Cutting((_LLAMA3,))),
    **dict.fromkeys(("glm4", "glm5"), Cutting((_LLAMA3,), whole=True)),
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "phi-2", "gigachat", "a.x-4.0", "exaone4", "mellum"), _AS_GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "mellum2"), _AS_DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "hunyuan", "stablelm2", "solar-open", "grok-2"), _AS_QWEN2),
    **dict.fromkeys(("bailingmoe", "bailingmoe2"), _AS_QWEN2),
    "laguna": Cutting((r"[^\n]+|\n+", _QWEN2)),
    "seed-coder": Cutting((_SEED,)),
    "exaone-moe": Cutting((_EXAONE_MOE,)),
    "afmoe": Cutting(_AFMOE),
    "tiny_aya": Cutting((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "qwen35": Cutting((_QWEN35,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Cutting((_GPT4O,))),
    "tekken": Cutting((TEKKEN,), whole=True, adds_bos=True),
    "kimi-k2": Cutting((_KIMI,)),
    "deepseek-llm": Cutting(_DEEPSEEK),
    "deepseek-coder": Cutting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, _DIGITS)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Cutting(_DEEPSEEK3)),
}
