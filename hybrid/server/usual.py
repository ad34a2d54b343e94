"""What clients of other servers send though it asks for nothing: fields with the one value that they may have here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from hybrid.server.numbers import Finite, No, Yes
from hybrid.server.strict import Strict

Zero = Annotated[Finite, Field(ge=0, le=0)]
One = Annotated[Finite, Field(ge=1, le=1)]


class Usual(Strict):
    """Of chats and completions. A value that asks for something else is refused."""

    # Of OpenAI's, vLLM's and SGLang's clients.
    use_beam_search: No | None = None
    length_penalty: One | None = None
    skip_special_tokens: Yes | None = None
    no_stop_trim: No | None = None
    include_stop_str_in_output: No | None = None
    continue_final_message: No | None = None
    add_generation_prompt: Yes | None = None
    safe_prompt: No | None = None
    # Of llama.cpp's: samplers that are off.
    typical_p: One | None = None
    top_n_sigma: Annotated[Finite, Field(ge=-1, le=-1)] | None = None
    mirostat: Zero | None = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None
    xtc_probability: Zero | None = None
    xtc_threshold: Any = None
    dry_multiplier: Zero | None = None
    dynatemp_range: Zero | None = None
    dynatemp_exponent: Any = None
    # Of no effect on the answer: names of requests, caches, and what is told while one waits.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    prediction: Any = None
    request_id: Any = None
    spaces_between_special_tokens: Any = None
    cache_prompt: Any = None
    id_slot: Any = None
    timings_per_token: Any = None
    return_progress: Any = None
    keep_alive: Any = None
    tool_stream: Any = None
