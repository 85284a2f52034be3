"""What few need, on top of the shell."""
