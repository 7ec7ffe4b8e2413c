"""Everything that needs an NVIDIA GPU, in one run: checks, measurements, a report. ``python -m benchmarks.gpu --help``."""
