"""Floor 6, training: the run, its log, its interruptions."""
