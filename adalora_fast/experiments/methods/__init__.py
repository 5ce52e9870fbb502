"""What is trained in a frozen model: adapters, virtual tokens, bottlenecks, their fusion, the nulls."""
