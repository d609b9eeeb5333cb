"""Floor 4, maths: the decoder, its losses, its training step, error rates."""
