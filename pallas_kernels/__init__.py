"""Fused kernels over packed codes. Plain arrays in, plain arrays out."""
