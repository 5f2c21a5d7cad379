"""Decoder-only language models as pure functions over a pytree of parameters."""
