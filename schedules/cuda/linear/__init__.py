"""Linear layers on a GPU: GEMV for a few tokens, GEMM for more, over one layout of each weight."""
