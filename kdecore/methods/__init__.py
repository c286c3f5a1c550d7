"""Methods, each of which turns a problem and its plan into a Selection: its record stands in its file; `register` adds one.

`plan` makes plans, of `levels`, `costs`, `choices` and `memory`; `key_tree`, `tree_queries`, `tree_lists`, `view` and
`first_order` are the treecode's.
"""

from kdecore.methods import auto, exact, hyper, kdeformer, sortlsh, treecode
from kdecore.methods.base import METHODS, Chunked, Method, Priors, Stages, register

__all__ = ["METHODS", "Chunked", "Method", "Priors", "Stages", "register"]

for _one in (auto, exact, sortlsh, hyper, kdeformer, treecode):
    register(_one.METHOD)
del _one
