"""Published data to training data."""
