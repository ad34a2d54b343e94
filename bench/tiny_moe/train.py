"""Trains the embedded default model within a time budget and writes it as a Hugging Face checkpoint.

python bench/tiny_moe/train.py --minutes 45 --out hybrid/assets/tiny_moe
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import optim
import torch
import torch.nn.functional as F
from data import Rows, encode, load_tokenizer, train_tokenizer
from export import check, check_text, export
from model import Config, TinyMoe
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

BALANCE_WEIGHT = 0.01
# Share of the run and row length in multiples of --length. Short rows are cheap; the long ones come while the
# learning rate is still high enough to learn the far positions, so that long chats stay in the trained range.
ROW_LENGTHS = ((0.65, 1), (0.88, 2), (1.0, 4))
WARM_UP = 0.02


@dataclass
class Run:
    """Everything that a checkpoint must hold to continue."""

    model: TinyMoe
    optimisers: list[torch.optim.Optimizer]
    seconds: float = 0.0
    tokens: int = 0
    step: int = 0
    position: int = 0
    losses: list[float] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes the checkpoint beside its target and renames it."""
        state = {name: getattr(self, name) for name in ("seconds", "tokens", "step", "position", "losses")}
        state |= {"model": self.model.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers]}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        for optimiser, saved in zip(self.optimisers, state.pop("optimisers"), strict=True):
            optimiser.load_state_dict(saved)
        for name, value in state.items():
            setattr(self, name, value)


def rate(progress: float) -> float:
    """Learning-rate factor: linear warm-up, then a cosine to zero."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.01)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def losses(model: TinyMoe, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss and balance loss."""
    hidden, balance, _ = model(batch[:, :-1])
    loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch[:, 1:].flatten())
    return loss, balance


def train_step(run: Run, batch: Tensor, factor: float) -> tuple[float, float]:
    """One update of all parameters."""
    for optimiser in run.optimisers:
        optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * factor
        optimiser.zero_grad(set_to_none=True)
    loss, balance = losses(run.model, batch)
    (loss + BALANCE_WEIGHT * balance).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimiser in run.optimisers:
        optimiser.step()
    return loss.item(), balance.item()


def use_idle_cores(most: int) -> None:
    """Takes fewer threads while other programs are busy: waiting threads would slow both sides down."""
    others = os.getloadavg()[0] - torch.get_num_threads()
    torch.set_num_threads(max(1, most - max(0, round(others))))


class Clock:
    """Tells when something is due again, in training seconds."""

    def __init__(self, every: float, now: float) -> None:
        self.every, self.last = every, now

    def due(self, now: float) -> bool:
        """True once per period."""
        if now - self.last < self.every:
            return False
        self.last = now
        return True


def fit(run: Run, rows: Rows, args: argparse.Namespace, write: Callable[[], None], progress: Progress) -> None:
    """The training loop; the budget counts training time only."""
    budget = args.minutes * 60
    task = progress.add_task("training", total=budget, completed=run.seconds)
    note, save, export_due = (Clock(every, run.seconds) for every in (20, 60, 60 * args.export_every))
    while run.seconds < budget:
        start = time.monotonic()
        length = args.length * next(factor for until, factor in ROW_LENGTHS if run.seconds < until * budget)
        batch = rows.batch(max(1, args.batch * args.length // length), length)
        loss, balance = train_step(run, batch, rate(run.seconds / budget))
        run.step, run.tokens, run.position = run.step + 1, run.tokens + batch.shape[0] * length, rows.position
        run.losses.append(loss)
        run.seconds += time.monotonic() - start
        progress.update(task, completed=run.seconds, description=f"loss {loss:.3f} balance {balance:.2f}")
        if note.due(run.seconds):
            use_idle_cores(args.threads)
            progress.console.print(status(run, balance))
        if save.due(run.seconds):
            run.save(args.checkpoint)
        if export_due.due(run.seconds):
            write()


def status(run: Run, balance: float) -> str:
    """A line for the log."""
    recent = sum(run.losses[-20:]) / len(run.losses[-20:])
    return (
        f"{run.seconds:6.0f} s step {run.step} tokens {run.tokens} loss {recent:.4f} balance {balance:.3f} "
        f"threads {torch.get_num_threads()}"
    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--out", type=Path, default=Path("hybrid/assets/tiny_moe"))
    parser.add_argument("--checkpoint", type=Path, default=Path("/tmp/tiny_moe.pt"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--batch", type=int, default=12, help="rows of --length tokens per step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--muon-lr", type=float, default=6e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--export-every", type=float, default=5, help="minutes between exports")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Tokenizer, text, training, export."""
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        cfg = Config()
        tokenizer = load_tokenizer(args.out) if args.resume else train_tokenizer(cfg.vocab_size)
        arrays = encode(tokenizer, args.documents, progress)
        model = TinyMoe(cfg)
        run = Run(model, optim.build(model, args.muon_lr, args.adam_lr))
        if args.resume:
            run.load(args.checkpoint)
        fit(run, Rows(arrays, run.position), args, lambda: export(model, tokenizer, args.out), progress)
        run.save(args.checkpoint)
        export(model, tokenizer, args.out)
    last = run.losses[-50:]
    print(f"tokens {run.tokens}, steps {run.step}, last loss {sum(last) / len(last):.4f}")
    check_text(args.out)
    print(f"largest difference from transformers: {check(model, args.out):.2e}")


if __name__ == "__main__":
    main()
