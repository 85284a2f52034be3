"""Training methods, one file each; every module exposes `make`."""
