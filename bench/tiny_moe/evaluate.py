"""Greedy samples, accuracy on unseen wordings and the routing table of an exported model.

python bench/tiny_moe/evaluate.py hybrid/assets/tiny_moe
"""

from __future__ import annotations

import argparse
import math
import random
from collections import defaultdict
from pathlib import Path

import questions
import torch
from corpus import END, MAKERS
from dialogues import Turn, render
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "Once upon a time, there was a little fox named",
    "One day, Lily went to the",
    "Once upon a time",
    "Tom was a brave boy who",
    "def add(a, b):\n",
)
ASKED = (
    "What colour is a lemon?",
    "where do fish live",
    "What does a cow say?",
    "how many legs has a spider?",
    "What is the opposite of hot?",
    "What is 2 + 3?",
    "who are you?",
    "Hello!",
    "Which is bigger, an elephant or a mouse?",
    "What is the capital of France?",
    "What do bees make?",
    "Can a penguin fly?",
    "what comes after Tuesday",
    "Who won the world cup in 1998?",
    "Write a Python function that adds two numbers.",
    "Tell me a story about a fox.",
)


class Subject:
    """The exported model behind the interface that the evaluation needs."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def complete(self, prompts: list[str], limit: int = 300) -> list[str]:
        """Greedy continuations up to the end token."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=limit,
                do_sample=False,
            )
        return self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def answer(self, asked: list[str], limit: int = 40) -> list[str]:
        """Answers to single questions without a system message."""
        return self.complete([render([Turn(q, "")], generate=True) for q in asked], limit)

    def routes(self, text: str) -> list[Tensor]:
        """Chosen experts per layer, [tokens, top_k]."""
        inputs = self.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = self.model(inputs["input_ids"], output_router_logits=True).router_logits
        return [layer.topk(self.model.config.num_experts_per_tok).indices for layer in logits]


def accuracy(subject: Subject, per_kind: int, console: Console) -> None:
    """Share of exactly right answers per kind of question, asked in wordings that were not trained."""
    rng = random.Random(12345)
    table = Table("kind", "exact", "a wrong answer")
    total = right = 0
    for kind in track(questions.KINDS, "questions", console=console):
        pairs = [kind(rng, True)[0] for _ in range(per_kind)]
        answers = subject.answer([question for question, _ in pairs], 60)
        wrong = [
            f"{q} -> {got}" for (q, want), got in zip(pairs, answers, strict=True) if not fits(kind, want, got.strip())
        ]
        total, right = total + per_kind, right + per_kind - len(wrong)
        table.add_row(kind.__name__, f"{per_kind - len(wrong)}/{per_kind}", wrong[0] if wrong else "")
    console.print(table)
    console.print(f"unseen wordings, exact answers: {right}/{total} = {right / total:.1%}")


def fits(kind: questions.Maker, want: str, got: str) -> bool:
    """Exact match, except where any member of a group or any joke is right."""
    if kind is questions.category and want.startswith("Three"):
        return got.split(" are ")[0] == want.split(" are ")[0]
    return got == want or (kind is questions.small_talk and want[:3] == "Why" and got[:1] == "W")


def utilisation(subject: Subject, documents: int, console: Console) -> None:
    """How evenly experts are used, and how much the choice says about the domain."""
    rng = random.Random(999)
    counts: dict[str, Tensor] = {}
    for domain, make in MAKERS.items():
        total = torch.zeros(subject.model.config.num_hidden_layers, subject.model.config.num_experts)
        for _ in track(range(documents), domain, console=console):
            for layer, index in enumerate(subject.routes(make(rng) + END)):
                total[layer] += torch.bincount(index.flatten(), minlength=total.shape[1])
        counts[domain] = total / total.sum(1, keepdim=True)
    table = Table("layer", "least", "most", "perplexity", "bits about domain", *(f"top in {d}" for d in counts))
    for layer in range(subject.model.config.num_hidden_layers):
        shares = torch.stack([counts[domain][layer] for domain in counts])
        mean = shares.mean(0)
        cells = [" ".join(f"{int(e)}:{row[e]:.0%}" for e in row.topk(3).indices) for row in shares]
        table.add_row(
            str(layer),
            f"{mean.min():.1%}",
            f"{mean.max():.1%}",
            f"{math.exp(entropy(mean)):.1f}",
            f"{information(shares):.3f}",
            *cells,
        )
    console.print(table)


def entropy(shares: Tensor) -> float:
    """Entropy in nats."""
    return float(-(shares * shares.clamp_min(1e-12).log()).sum())


def information(shares: Tensor) -> float:
    """Mutual information between domain and expert in bits, for equally frequent domains."""
    return (entropy(shares.mean(0)) - sum(entropy(row) for row in shares) / len(shares)) / math.log(2)


def samples(subject: Subject, console: Console) -> None:
    """Prints greedy texts and answers."""
    for prompt, text in zip(PROMPTS, subject.complete(list(PROMPTS)), strict=True):
        console.print(f"> {prompt}", style="bold", markup=False)
        console.print(text, markup=False, highlight=False)
    grouped: dict[bool, list[str]] = defaultdict(list)
    for question in ASKED:
        grouped["story" in question].append(question)
    for long, asked in grouped.items():
        for question, text in zip(asked, subject.answer(asked, 300 if long else 60), strict=True):
            console.print(f"{question}\n    {text}", markup=False, highlight=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--per-kind", type=int, default=20)
    parser.add_argument("--documents", type=int, default=40, help="documents per domain for the routing table")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=150)
    subject = Subject(args.directory)
    samples(subject, console)
    accuracy(subject, args.per_kind, console)
    utilisation(subject, args.documents, console)


if __name__ == "__main__":
    main()
