"""Data at rest: where every trial's bytes lie; datasets made, encoded and checked."""
