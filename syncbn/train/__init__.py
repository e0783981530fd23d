"""The training service: jobs described by Hydra configs and started by torchrun."""
