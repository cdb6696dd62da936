"""Weights in huge pages, where the kernel grants them to whoever asks (`docs/decisions.md`, "CPU")."""

HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")
"""The environment variable that has torch ask for them, and its value; to be set before the first tensor."""
