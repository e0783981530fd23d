"""Training as a service, without HTTP and without torch: what is submitted, kept and started."""
