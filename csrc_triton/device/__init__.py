"""Device functions that the kernels compose: each formula stands here once."""
