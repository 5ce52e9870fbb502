"""A small recipe to plan sweeps with, and how to run them."""

from adalora_fast.experiments.sweep.sweep import run_sweep
from tests.helpers.tiny import printed, quiet_console

GRID = {"tasks": ["sst2"], "arms": ["sensitivity", "lora"], "seeds": [0, 1]}
DEFAULTS = {
    "epochs": 2, "learning_rate": 5e-3, "batch_size": 8, "max_length": 16, "init_r": 4, "target_r": 2,
    "tinit": 2, "tfinal": 4, "deltaT": 2,
}  # fmt: skip
TUNING = {"learning_rates": [1e-3, 4e-3, 2e-3], "seeds": [7, 8], "held_out": 0.25}


def carry_out(plan, output, **options):
    console = quiet_console()
    return run_sweep(plan, output, console, **options), printed(console)
