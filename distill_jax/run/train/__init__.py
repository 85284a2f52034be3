"""Training one run: its loop, the events between steps, its measurements and artifacts."""
