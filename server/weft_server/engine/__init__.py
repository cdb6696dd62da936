"""The engine: the loop that owns the device, and the process around it. Knows nothing of HTTP."""
