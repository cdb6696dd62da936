"""Weight formats of the frozen base."""
