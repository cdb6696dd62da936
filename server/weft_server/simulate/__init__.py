"""`weft simulate`: traces replayed through the scheduler without a GPU."""
