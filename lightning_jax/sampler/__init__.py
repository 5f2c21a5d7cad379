"""The sampler: continuous batching over paged KV, with prefix reuse and several decode steps per dispatch."""
