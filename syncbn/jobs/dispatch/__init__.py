"""What starts jobs, follows them and removes what is old."""
