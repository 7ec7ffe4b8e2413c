"""Everything that needs an NVIDIA GPU, in one run: checks, measurements, a report. See ``__main__``."""
