"""What may be submitted, and what it becomes."""
