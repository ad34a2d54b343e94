"""`python -m hybrid.serve`: the same as `hybrid serve`."""

from hybrid.commands.console import run_app
from hybrid.commands.serve import app

if __name__ == "__main__":
    run_app(app, "python -m hybrid.serve")
