"""What this machine offers, measured or granted."""
