"""Where jobs run: on this machine, or on a cluster that has a scheduler of its own."""
