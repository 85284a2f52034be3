"""Pure functions over pytrees: no files, no flags, no clocks, no printing."""
