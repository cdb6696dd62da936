"""Use cases of the API process: no FastAPI, no tensors."""
