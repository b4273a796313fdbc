"""The native back-end: C++ row kernels (kernels/csrc) behind a C interface, on CPU."""
