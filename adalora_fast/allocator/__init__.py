"""Who keeps which triplets: scores and their statistics, the budget, the mask, and the state of it all."""
