"""World models: their data, their training, and how true they are."""
