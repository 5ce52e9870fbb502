"""Experiments: tasks, recipes, run folders, training, sweeps, reports and plots.

Read from the bottom up: `docstrings`, `tasks`, `squad` and `translation` give the data, `models` and
`encoders` what is trained, `arms` and `adapters` (with `bottleneck`, `fusion` and `prompts`) how, `recipes`
the settings, `runs` the place where one run lives, `workloads`, `question_answering` and `translation` what
goes into a model and what is made of its outputs, `training` the run itself (with `trainer`, `recorder` and
`stopwatch`), `allocation` where the budget moves in it, `preflight`, `tuning`, `sweep` and `cluster` many of
them; `finished` puts the model of a run together again and `evaluation` judges it on other rows; `report` and
`plots` turn result files into tables and pictures; `demo` puts all of it together.
"""
