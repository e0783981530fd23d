"""From a command line to processes that train: server, supervisor, ranks, and what ends those."""
