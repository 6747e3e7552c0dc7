"""ScienceWorld: the simulator behind the contract, and its games."""
