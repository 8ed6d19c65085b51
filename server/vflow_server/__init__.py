"""The VFlow service: gRPC in front of the library ``vflowopt``.

A servicer checks a request and submits its work to the engine. The events of that work come back as responses. Only the
threads of :mod:`vflow_server.engine` run the model. Pictures are decoded in processes of their own. The rest runs on
the event loop, or on threads that use the disk.

The files of this package are the command ``vflow`` (``cli``), its settings, and the service that joins the parts
(``app``, ``service``). The parts are packages. Each imports only from those below it:

================  ====================================================================================
``servicers``     the services of the contract: they check requests and fill in responses
``monitoring``    gauges, and the side port with metrics and the status page
``sessions``      sessions, and the work that they give to the engine: turns, pictures, forks
``tuning``        searches for strategies, and the fidelity monitor of the active one
``strategies``    which strategies exist, which one is active, and how they compare
``images``        pictures and videos of requests: decoded within bounds, held for their tenant
``engine``        the thread that owns the model, its queues and its scheduler
``kv``            the KV caches of all sessions: pages, preemption, offloading
``store``         the data folder: what a restart needs
``interceptors``  what surrounds every call: metrics, traces, access, draining
``access``        tokens, certificates and tenants
``telemetry``     metrics, traces and logs, for any part to report to
``watchdog``      notices when a thread or a task that the service needs has ended, or stands still
``rpc``           errors, resource names, pages, and the gRPC servers
================  ====================================================================================
"""
