"""From prompts to text: the Python API, the scheduler and what a request goes through."""
