"""Experts of slots on a GPU: Triton kernels that read the packed layout of the host, and what they compute in torch."""
