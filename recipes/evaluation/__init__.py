"""What recipes/robustness.py is made of: the run under test, its parts, their result, table and figures."""
