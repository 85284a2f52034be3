"""The shell: files, flags, clocks and consoles."""
