"""Tables and reports made from result files, and from nothing else."""

from typing import Any

from adalora_fast.experiments.run.runs_table import find_runs, load_results, results_table

__all__ = ["find_runs", "load_results", "results_table", "write_folder_page", "write_report"]


def __getattr__(name: str) -> Any:
    # Loaded only when it is asked for: training imports this package for its small table.
    if name == "write_report":
        from .write import write_report

        return write_report
    if name == "write_folder_page":
        from .html import write_folder_page

        return write_folder_page
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
