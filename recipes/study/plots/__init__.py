"""The figures of a study's report."""
