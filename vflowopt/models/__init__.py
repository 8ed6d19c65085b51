"""The families of large multimodal models that can be served, one file each.

A new family is a subclass of :class:`~vflowopt.models.interface.MultimodalModel` and a line in
:mod:`~vflowopt.models.families`.
"""
