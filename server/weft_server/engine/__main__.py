"""`python -m weft_server.engine`: sets how OpenMP's threads wait, which must precede the first import of
torch."""

import os
import sys

# The API process always runs beside the engine. Threads that spin while they wait then stall one another
# (`docs/decisions.md`, "OpenMP threads").
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from weft_server.engine.process import main

status = main()
sys.stdout.flush()
sys.stderr.flush()
# Everything is saved and sent. Running the interpreter's finalizers beside live native threads can abort.
os._exit(status)
