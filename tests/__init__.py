"""Tests of plop_dist; see README.md here."""

import signal

# In a shell's background job Ctrl-C is ignored, by whatever is started there too: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
