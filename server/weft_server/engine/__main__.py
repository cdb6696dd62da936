"""`python -m weft_server.engine`: sets how OpenMP's threads wait and how torch allocates, which must
precede the first import of torch."""

import os
import sys
import traceback

from weft_server.huge_pages import HUGE_PAGES

# The API process always runs beside the engine. Threads that spin for long while they wait then stall one
# another; those that sleep at once wake late (`docs/decisions.md`, "OpenMP threads").
if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault(*HUGE_PAGES)

from weft_server.engine.process import main

status = 1
try:
    status = main()
except BaseException:
    traceback.print_exc()
finally:
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything that can be is saved and sent. The interpreter's own end would wait for threads that wait for
    # the store, and running its finalizers beside live native threads can abort.
    os._exit(status)
