"""Floor 5, results: what a run leaves, and what can be said of it."""
