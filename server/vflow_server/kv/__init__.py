"""The KV caches of all sessions: which hold pages, which are evicted, and where offloaded caches are held."""
