"""Native kernels for the CPU, and for each of them a twin in plain PyTorch that runs anywhere."""
