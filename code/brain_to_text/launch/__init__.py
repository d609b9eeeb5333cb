"""The desk: jobs requested, checked, watched, fetched. Knows top, `labels` and `dataset` only."""
