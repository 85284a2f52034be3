"""Training one run: its loop, what is due between steps, what it measures and leaves."""
