"""What the routes ask of `syncbn.jobs`: training jobs, without HTTP."""
