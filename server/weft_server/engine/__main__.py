"""`python -m weft_server.engine`: sets how OpenMP's threads wait, which must precede the first import of
torch."""

import os
import sys

# Threads that spin between parallel regions starve the API process on a machine of few cores, and threads
# that sleep at once pay a wake-up per operator. A short spin does neither (`docs/decisions.md`, "OpenMP
# threads").
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from weft_server.engine.process import main

status = main()
sys.stdout.flush()
sys.stderr.flush()
# Everything is saved and sent. Running the interpreter's finalizers beside live native threads can abort.
os._exit(status)
