"""Networks behind `Model(init, apply)`; every module exposes `make`."""
