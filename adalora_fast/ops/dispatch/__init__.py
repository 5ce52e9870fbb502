"""How an op finds the implementation that runs: backends, launches, the compiled library, tables."""
