"""What training reads and writes: checkpoints, networks of other runs, stored teacher outputs.

No configs, flags or consoles. Errors name the argument at fault, or what `where` calls it. The
modules for files, paths and folders of checkpoints need no JAX.
"""
