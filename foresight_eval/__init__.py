"""Evaluation: games x methods x devices, and what comes of it."""
