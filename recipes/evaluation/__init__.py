"""Everything that looks at a trained run: accuracy, predictions, robustness, features through training."""
