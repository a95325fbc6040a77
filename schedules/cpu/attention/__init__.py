"""Attention over the paged KV cache, and over latents, on a CPU."""
