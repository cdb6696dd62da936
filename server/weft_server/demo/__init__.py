"""The bundled base model, its tasks, and `weft demo`."""
