"""`hybrid policy`: policies, admission rules and prefetches of one's own, without a change of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.commands.console import say, show
from hybrid.commands.flags import command, new_app
from hybrid.commands.new_file import write_new
from hybrid.errors import ConfigError, cache_errors

app = new_app()


KINDS = ("policy", "admission", "prefetch")  # of templates


@command(app)
def new(
    path: Annotated[Path, typer.Argument(help="Where to write it, as my_policy.py.")],
    kind: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}.", metavar="KIND")] = KINDS[0],
) -> None:
    """Write a policy or a rule that works, to be changed. A file that is there is left alone."""
    import gpu_cache

    if kind not in KINDS:
        raise ConfigError(f"--kind is {kind!r:.80}; allowed: {', '.join(KINDS)}")
    path = path.expanduser()
    template = Path(gpu_cache.__path__[0]) / f"template_{kind}.py"
    write_new(path, template.read_bytes(), ".py", "a policy is a file of Python")
    say(f"{path}: change it, then `hybrid policy check {path}`")


@command(app)
def check(name: Annotated[str, typer.Argument(help="FILE.py, FILE.py:CLASS, or a name.", metavar="POLICY")]) -> None:
    """Drive a policy, an admission rule or a prefetch through small caches and say which rules it keeps; the first that
    it breaks ends with an error.
    """
    from gpu_cache import rule_check

    with cache_errors():
        kind = rule_check.class_of(name)
        kept = rule_check.check(kind)
    show("\n".join([f"{kind.__name__} keeps the rules:", *(f"  {rule}" for rule in kept)]))


@command(app)
def ls() -> None:
    """List the policies, admission rules and prefetches that there are, those of installed packages too."""
    from gpu_cache.rule_check import described

    for title, kinds in described().items():
        show(f"{title}:")
        for name, text in kinds.items():
            show(f"  {name:<12} {text}")
