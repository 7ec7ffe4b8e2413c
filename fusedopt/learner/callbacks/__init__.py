"""One feature of training in each file."""
