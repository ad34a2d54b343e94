"""One file for each command of `hybrid`, and what they share: flags, console, prompts, output files."""
