"""KV-cache quantization for JAX."""
