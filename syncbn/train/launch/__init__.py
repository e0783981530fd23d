"""From a command line to processes that train: launcher, agent, ranks, and what ends those."""
