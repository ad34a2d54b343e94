"""Published quantisations that store a matrix as several tensors: a file each, and `methods.py` tells them apart."""
