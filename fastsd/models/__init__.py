"""The networks: a config in, an nn.Module out. No file, no weights, no sampler."""
