"""Floor 3, data in motion: from ranged GETs to batches of tensors."""
