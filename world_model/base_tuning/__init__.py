"""Training of the world model."""
