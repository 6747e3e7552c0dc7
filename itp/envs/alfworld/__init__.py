"""ALFWorld: the engine behind the contract, its games, new games, an expert, and alternative goals."""
