"""Lightning JAX: one process that serves a language model to agents and trains it with their rewards."""
