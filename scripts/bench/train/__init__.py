"""Training, timed: its step, its loop beside others, and what goes before the first step."""
