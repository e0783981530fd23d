"""The service of training jobs under thousands of small jobs, while its processes are killed."""
