"""Scripts that measure fusedopt against eager callbacks and torch.optim; ``python -m benchmarks.demo`` is the demo."""
