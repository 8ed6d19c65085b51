"""The pictures and videos of requests: decoded in worker processes within bounds, and held for their tenants.

A picture's way: ``store`` -> ``decoders`` (two lanes) -> ``decoding_queue`` (whose file is next) -> ``decoding_worker``
(a process, as the service sees it) -> ``decoding_process`` (its program), and back. ``decoded_memory`` counts pixels.

The workers are not those of a library's pool, for three reasons. A pool of :mod:`concurrent.futures` is broken for all
when one of its processes dies, and before Python 3.14 has no way to end one. Pebble's can end one, but all share a pipe
and a lock, which a process that dies may hold. And both unpickle what comes back: a file that took over a process could
run code in the service.
"""
