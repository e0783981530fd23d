"""HTTP in, HTTP out: each module is the router of one part of the protocol."""
