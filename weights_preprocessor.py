"""`python weights_preprocessor.py`: the command `hybrid pack`."""

from hybrid.commands.console import run_app
from hybrid.commands.pack import app

if __name__ == "__main__":
    run_app(app, "weights_preprocessor.py")
