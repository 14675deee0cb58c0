"""What factorized_attention and joint_attention share: checks, options, registration and the PyTorch core."""
