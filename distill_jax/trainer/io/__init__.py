"""Files of training: checkpoints, networks of other runs, stored teacher outputs.

There are no configs, flags or consoles. Errors name the argument at fault, or `where` if it is
given. The modules for files, paths and folders of checkpoints do not need JAX.
"""
