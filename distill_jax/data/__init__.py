"""Data sources, the step-indexed loader, and transforms that run on the device."""
