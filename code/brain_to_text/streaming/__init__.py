"""Data in motion: from ranged GETs to batches of tensors."""
