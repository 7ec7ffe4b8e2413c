"""The cpp backend: C++ by the system compiler, on torch's threads."""
