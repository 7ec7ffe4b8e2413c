"""The cuda backend: CUDA C++ by NVRTC, through the driver."""
