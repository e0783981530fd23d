"""A run's directory: what is written into it, and what is read from it and compared."""
