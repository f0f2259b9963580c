"""Attention and blocks in plain PyTorch, for where no kernel runs."""
