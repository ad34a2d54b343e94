"""A model that answers what a test has written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dummy_engine import DummyEngine
from dummy_tokenizer import BYTES, SPECIAL

from hybrid import LLM
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.tokenizer import Tokenizer

TEMPLATE = ChatTemplate(
    "{{ tools|length if tools }}{{ mood if mood is defined }}"
    "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}."
)


class Model:
    """A model that answers every prompt with the next of its texts, the last again and again, at any temperature."""

    def __init__(
        self, *answers: str, tokenizer: Tokenizer = BYTES, template: ChatTemplate = TEMPLATE, **plan: Any
    ) -> None:
        plan = {"max_seq_len": 400, "kv_token_budget": 1600, "max_rows": 64, **plan}
        self.engine = DummyEngine(next_token=self._next, fail=self._before, peak=80.0, **plan)
        self.llm = LLM.from_engine(self.engine, tokenizer, frozenset([SPECIAL]), template)
        self.fail: Callable[[Any], None] = lambda batch: None
        self.prompts: list[str] = []
        self._scripts = [[*tokenizer.encode(answer), SPECIAL] for answer in answers]
        self._tokenizer, self._length = tokenizer, 0

    def _before(self, batch: Any) -> None:
        self.fail(batch)

    def _next(self, tokens: list[int]) -> int:
        """Prompts end in a dot, which no answer holds."""
        dot = max((place for place, token in enumerate(tokens) if token == ord(".")), default=None)
        if dot is None:
            return SPECIAL
        if dot == len(tokens) - 1:
            self.prompts.append(self._tokenizer.decode(tokens))
        said = self._scripts[min(len(self.prompts), len(self._scripts)) - 1]
        return said[min(len(tokens) - 1 - dot, len(said) - 1)]
