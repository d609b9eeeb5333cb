"""Floor 2, data at rest: where every trial's bytes lie; datasets made, encoded and checked."""
