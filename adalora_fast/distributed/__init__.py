"""Several processes that train one model, and parameters that are sharded over them."""
