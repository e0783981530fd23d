"""Train a model from the configs in conf/; see --help."""

from syncbn.train.launch import main

if __name__ == "__main__":
    main()
