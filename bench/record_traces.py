"""Record the traces of tests/traces/: which experts the embedded model chose for stories, chat and code-like text.

    python bench/record_traces.py tests/traces
    python bench/record_traces.py FOLDER --next-gate    # and what routers say one layer early

Greedy, one sequence after another, on whatever processor; another instruction set may round a tie differently.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hybrid import LLM, SamplingParams

TOKENS = 48  # of each answer
PROMPTS = {
    "stories": [
        "Once upon a time, there was a little fox named",
        "One day, a girl found a round seed in the",
        "The old owl lived in a",
        "It was raining in the village when",
    ],
    "chat": [
        "What is the capital of France?",
        "Who are you?",
        "Tell me a story about a cat.",
        "What is 2 + 3?",
    ],
    "code": [
        "def add(a, b):\n",
        "for i in range(10):\n",
        "def largest(numbers):\n",
        "x = [1, 2, 3]\n",
    ],
}


def record(folder: Path, name: str, prompts: list[str], next_gate: bool) -> None:
    cache = {"cache": {"prefetch": "next-gate", "delay": 0}} if next_gate else {}
    with (
        LLM(device="simulated" if next_gate else "cpu", routes=True, max_batch=1, threads=1, **cache) as llm,
        llm.record_trace(folder / f"{name}.csv", print),
    ):
        chat = name == "chat"
        inputs = [llm.encode_chat([{"role": "user", "content": prompt}]) for prompt in prompts] if chat else prompts
        llm.generate(inputs, SamplingParams(max_tokens=TOKENS, ignore_eos=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the traces")
    parser.add_argument("--next-gate", action="store_true", help="record what routers say one layer early, too")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in PROMPTS.items():
        record(options.folder, name, prompts, options.next_gate)


if __name__ == "__main__":
    main()
