"""The kernels for GPUs, written in Triton; imported only where a GPU runs them."""
