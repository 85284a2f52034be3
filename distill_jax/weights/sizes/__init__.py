"""Sizes in which networks are published: what a file of weights may be, and what `models` build."""
