"""The layer on a GPU: its bytes, launches and waits counted, its time measured beside torch's."""
