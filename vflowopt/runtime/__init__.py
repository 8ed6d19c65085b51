"""The runtime: sequences of tokens and pictures, their staged KV cache, and the decoder that fills it."""
