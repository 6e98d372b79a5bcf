"""One script per claim; results/*.json hold what was measured, where and at which commit."""
