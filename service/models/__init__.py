"""Serving models, without HTTP: from the models directory to an answer."""
