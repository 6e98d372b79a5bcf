"""Study files for recipes/compare.py, what they found, and the tables that documents make of it."""
