"""The policy π_θ: an LM that chooses how far to look ahead, and acts."""
