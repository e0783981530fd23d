"""The service beside LitServe, BentoML, MLServer and plain FastAPI, on loopback."""
