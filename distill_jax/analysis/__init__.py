"""Analysis of traced functions: an interpreter of their equations (`walk`) and rules for it."""
