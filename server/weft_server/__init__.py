"""Weft's server: REST API, engine process, stores.

The sub-packages follow the life of a request: `api` (HTTP) → `service` (use cases) → `protocol` (messages) →
`engine` (the loop that owns the device). `docs/architecture.md` walks through it in numbered steps.
"""

__version__ = "0.1.0"
