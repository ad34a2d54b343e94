"""`python -m hybrid.main`: the command `hybrid run`."""

from hybrid.commands.console import run_app
from hybrid.commands.run import app

if __name__ == "__main__":
    run_app(app, "python -m hybrid.main")
