"""Experiments: tasks, recipes, run folders, training, reports and plots.

Read from the bottom up: `docstrings` and `tasks` give the data, `models` the encoders, `recipes` the
settings, `runs` the place where one run lives, `training` the run itself, `report` and `plots` turn result
files into tables and pictures, and `demo` puts all of it together.
"""
