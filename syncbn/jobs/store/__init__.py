"""What is kept of jobs, in a file of SQLite."""
