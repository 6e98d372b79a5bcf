"""What every part of the recipes stands on: configuration, command line, files, processes, plot style."""
