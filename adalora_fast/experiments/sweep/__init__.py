"""Many runs: the plan, the checks before the first one, learning rates, the processes that share them."""
