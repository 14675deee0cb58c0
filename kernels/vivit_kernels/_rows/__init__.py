"""What a transformer block does row by row between its products: defined by PyTorch's ops, fused by Triton."""
