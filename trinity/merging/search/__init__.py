"""Search the parameters of a merge."""
