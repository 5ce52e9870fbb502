"""The tasks and their rows, and what goes into a model and is made of its outputs."""
