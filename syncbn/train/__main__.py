"""`python -m syncbn.train`: the same as `syncbn-train`, for torchrun's -m."""

from syncbn.train.launch.command import main

main()
