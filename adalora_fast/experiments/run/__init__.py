"""One run: its folder, its training, what it says while it works and leaves when it is done."""
