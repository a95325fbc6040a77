"""What a machine with an NVIDIA GPU is asked: is it right, how fast is it, which schedules are best; docs/gpu.md."""
