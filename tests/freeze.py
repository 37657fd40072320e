"""The server that forks the ranks imports this last: its modules stay, so no rank's garbage collector searches them."""

import atexit
import gc

gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # libraries that count their objects would report the frozen ones as leaked
