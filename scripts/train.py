"""Train a model from the configs in conf/; see --help."""

from syncbn.train.launch.command import main

if __name__ == "__main__":
    main()
