"""Imagine-then-Plan: language agents that look ahead with a learned textual world model."""

__version__ = "0.1.0"
