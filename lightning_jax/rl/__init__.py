"""Reinforcement learning: recorded calls to rows, rows to batches, batches to updates; and checkpoints."""
