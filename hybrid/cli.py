"""The console script `hybrid`: one word chooses the command, whose module is imported only then."""

from __future__ import annotations

import sys
from importlib import import_module

from hybrid.commands.signals import end_at_once, ending_signals

COMMANDS = {
    "run": ("hybrid.commands.run", "generate text from prompts, or chat"),
    "chat": ("hybrid.commands.chat", "talk with a model"),
    "serve": ("hybrid.commands.serve", "answer over HTTP, as OpenAI's API does"),
    "pack": ("hybrid.commands.pack", "pack a model once, so that every start maps it"),
    "store": ("hybrid.commands.store", "list and remove packed models"),
    "models": ("hybrid.commands.models", "list the families of models that can be loaded"),
    "fit": ("hybrid.commands.fit", "tell what a model needs and about how fast it runs, on any machine"),
    "bench": ("hybrid.commands.bench", "measure the speed of prompts and of decoding"),
    "perplexity": ("hybrid.commands.perplexity", "tell how well a model foretells a text"),
    "verify": ("hybrid.commands.verify", "compare results with and without an expert cache"),
    "simulate": ("hybrid.commands.simulate", "replay a trace through expert caches of many shapes and policies"),
    "trace": ("hybrid.commands.trace", "convert and look at traces, whoever recorded them"),
    "experiment": ("hybrid.commands.experiment", "compare expert caches as a file says, with a report"),
    "policy": ("hybrid.commands.policy", "begin, check and list policies and rules of your own"),
    "plot": ("hybrid.commands.plot", "draw what run and simulate wrote"),
}


def main() -> None:
    """Each command's module has a typer application named `app`."""
    with ending_signals(end_at_once):  # also while all this is imported
        from hybrid.commands.console import run_app, starting

        name = sys.argv[1] if len(sys.argv) > 1 else "--help"
        with starting():
            if name in COMMANDS:
                run_app(import_module(COMMANDS[name][0]).app, f"hybrid {name}", sys.argv[2:])
            _show(name)


def _show(name: str) -> None:
    """What is no command. Raises ConfigError."""
    from hybrid.errors import ConfigError

    if name in ("--help", "-h"):
        print(_help())
    elif name == "--version":
        print(f"hybrid {import_module('hybrid').__version__}")
    else:
        raise ConfigError(f"there is no command {name!r}; allowed: {', '.join(COMMANDS)}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: hybrid COMMAND [OPTIONS]",
            "",
            "Serve Mixture-of-Experts language models on the machine people already have.",
            "",
            "Commands (hybrid COMMAND --help says more):",
            *lines,
            "",
            "Options:",
            "  --version  the version of this program",
            "  --help     this text",
        ]
    )


if __name__ == "__main__":
    main()
