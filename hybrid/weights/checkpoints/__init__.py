"""What is read: the sources that weights are packed from."""
