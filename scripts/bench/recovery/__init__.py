"""How much time a job loses where a rank is killed, and where it is one of many."""
