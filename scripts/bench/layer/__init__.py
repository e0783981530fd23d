"""The layer and its parts, measured beside torch's unsynchronized layer."""
