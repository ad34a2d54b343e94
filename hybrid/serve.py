"""`python -m hybrid.serve`: the same as `hybrid serve`."""

if __name__ == "__main__":
    from hybrid.commands.signals import end_at_once, ending_signals

    with ending_signals(end_at_once):  # also while all this is imported
        from hybrid.commands.console import run_app
        from hybrid.commands.serve import app

        run_app(app, "python -m hybrid.serve")
