"""What a run is asked to do: recipes, arms, settings and their checks."""
