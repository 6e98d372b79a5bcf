"""What a person runs: training, evaluation and comparison on top of ncreg."""
