"""A check of the GPU paths: parity with the CPU, speed, device memory. It needs PyTorch, NumPy, SciPy, Numba and PyArrow alone."""
