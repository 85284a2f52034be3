"""Optional extensions on top of the shell."""
