"""Imported last by the server that forks the ranks: what it holds is no garbage, and no rank has to look through it."""

import atexit
import gc

gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # or libraries that count what they made call it leaked
