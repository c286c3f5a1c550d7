"""What kernels are compiled and launched with."""
