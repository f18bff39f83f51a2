"""The CuPy backend of nibs: raw CUDA kernels, which the host runner also executes on a CPU."""
