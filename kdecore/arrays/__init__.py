"""Arrays of any library: namespaces, backends, gradients, memory, rows, scalars, random numbers, files; and all errors."""
