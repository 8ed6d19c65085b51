"""What is held to be reused: KV caches in the pool, in host memory and in files, shared prefixes, and pictures."""
