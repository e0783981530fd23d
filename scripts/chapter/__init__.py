"""The claims of the chapter on batch normalization, computed; `python -m scripts.chapter`."""
