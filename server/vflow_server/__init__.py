"""The VFlow service: gRPC in front of the library ``vflowopt``.

What flows: a request is checked by a servicer, becomes a unit of work on the engine, and its events come back as
responses. Only :mod:`vflow_server.engine.engine` runs threads that touch the model; everything else lives on the
event loop.

Here are the command, its settings and the wiring; the rest is in rooms. From the top: ``servicers`` and ``monitoring``
answer who asks; ``sessions``, ``tuning`` and ``strategies`` are what they ask about; ``engine`` and ``caches`` do the
work; ``store``, ``access``, ``telemetry`` and ``rpc`` are there for all. A room imports from rooms further down only.
"""
