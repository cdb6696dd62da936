"""Weights in huge pages, where the kernel grants them to whoever asks (`docs/decisions.md`, "CPU")."""

import os


def ask_for_huge_pages() -> None:
    """Have torch ask for them, in this process and those that it starts; before its first tensor. What the
    environment says goes first."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
