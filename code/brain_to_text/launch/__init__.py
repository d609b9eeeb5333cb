"""Training jobs: requested, checked, watched, fetched. Knows top to `dataset` only."""
