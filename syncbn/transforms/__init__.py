"""What is done to whole models: convert, fold, fuse and recalibrate their normalizations."""
