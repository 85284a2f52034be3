"""Weights of signals from evidence, one file each; every module exposes `make`."""
