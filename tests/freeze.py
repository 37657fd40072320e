"""Imported last by the server that forks the ranks: what it holds is no garbage, and no rank has to look through it."""

import gc

gc.collect()
gc.freeze()
