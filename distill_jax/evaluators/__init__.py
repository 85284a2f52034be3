"""Evaluators over collected outputs; every module exposes `make`."""
