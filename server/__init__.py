"""The VFlow service: gRPC in front of the library ``vflowopt``.

What flows: a request is checked by a servicer, becomes a unit of work on the engine, and its events come back as
responses. Only :mod:`vflow_server.engine` runs threads that touch the model; everything else lives on the event loop.
"""
