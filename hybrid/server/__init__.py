"""The HTTP server: what clients send, checked; what they get back."""
