"""Experiments: tasks, recipes, run folders, training, sweeps, reports and plots.

Read the rooms from the ground up; imports only go down. `settings`: what a run is asked to do. `metrics`: how
it is judged. `data`: the tasks and their rows. `models`: the pretrained encoders. `methods`: what of a model
is trained. `run`: one run and its folder. `sweep`: many of them. `report`: tables and pictures of what they
left. `evaluation` judges a finished run on other rows; `demo` puts all of it together.
"""
