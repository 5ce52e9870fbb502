"""The pretrained models: which one is meant, how its parts are called, how it is loaded."""
