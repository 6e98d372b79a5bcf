"""Studies: recipes × seeds × data, run, aggregated and reported; recipes/compare.py is their command line."""
