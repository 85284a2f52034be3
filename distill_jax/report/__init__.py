"""One offline HTML file about a run or a study, built from the files of its folder alone.

The package also has the plain-text tables and the statistics that the console prints.
"""

from distill_jax._lazy import attach

__getattr__, __dir__ = attach(__name__)
