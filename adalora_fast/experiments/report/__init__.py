"""Tables and reports made from result files, and from nothing else."""

from .runs_table import find_runs, load_results, results_table


__all__ = ["find_runs", "load_results", "results_table", "write_report"]
