"""`hybrid policy`: replacement policies of one's own, without a change of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.commands.console import say, show
from hybrid.commands.flags import command, new_app
from hybrid.commands.new_file import write_new
from hybrid.errors import cache_errors

app = new_app()


@command(app)
def new(path: Annotated[Path, typer.Argument(help="Where to write it, as my_policy.py.")]) -> None:
    """Write a policy that works, to be changed. A file that is there is left alone."""
    import gpu_cache.template_policy

    path = path.expanduser()
    write_new(path, Path(gpu_cache.template_policy.__file__).read_bytes(), ".py", "a policy is a file of Python")
    say(f"{path}: change it, then `hybrid policy check {path}`")


@command(app)
def check(name: Annotated[str, typer.Argument(help="FILE.py, FILE.py:CLASS, or a name.", metavar="POLICY")]) -> None:
    """Drive a policy through small caches and say which rules it keeps; the first that it breaks ends with an error."""
    from gpu_cache.policies import policy_class
    from gpu_cache.policy_check import check_policy

    with cache_errors():
        kind = policy_class(name)
        kept = check_policy(kind)
    show("\n".join([f"{kind.__name__} keeps the rules:", *(f"  {rule}" for rule in kept)]))


@command(app)
def ls() -> None:
    """List the policies that there are, those of installed packages too."""
    from gpu_cache.policies import POLICIES, names_of_policies, policy_class

    with cache_errors():
        for name in names_of_policies():
            text = (policy_class(name).__doc__ or "").strip().split("\n")[0]
            show(f"{name:<12} {text}" if name in POLICIES else f"{name:<12} {text} (of an installed package)")
