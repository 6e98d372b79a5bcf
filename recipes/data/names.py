"""Names of the data sets, apart from what reads them: train.py --help lists them and loads nothing else."""

IN_PYTHON = "python"
"""data.name of a run whose data were given to train(config, data=…)."""

SOURCE_NAMES = ("digits", "fashion_mnist", "mnist5k", "folder", IN_PYTHON)
"""The keys of `recipes.data.load.SOURCES`."""
