"""The tests mirror the source; their oracles are diffusers and transformers."""
