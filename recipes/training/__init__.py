"""What a training run is made of; recipes/train.py puts it together."""
