"""A CUDA whose kernels do nothing: the GPU path run on a machine without a GPU; see build.py."""
