"""The run: its container, its log, its checkpoints, its interruptions."""
