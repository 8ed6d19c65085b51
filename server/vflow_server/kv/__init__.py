"""The KV caches of all sessions: who holds pages, who gives way, and where their caches go meanwhile."""
