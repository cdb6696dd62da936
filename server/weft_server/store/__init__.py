"""Durable state: versioned records, event streams, counters and content-addressed blobs."""
