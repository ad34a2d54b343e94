"""Experiments with expert caches: results that are kept, and figures of them."""
