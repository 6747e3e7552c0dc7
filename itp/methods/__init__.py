"""The ways to act: imagine-then-plan and the methods that it is compared with, and actors without a language model."""
