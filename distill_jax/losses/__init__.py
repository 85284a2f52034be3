"""Per-example losses: pure functions that return one value per example, `[b]`."""
