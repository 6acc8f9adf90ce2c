"""Documentation of the parameters that all modules share."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  endpoints:
    description: Nodes to ask, as C(host:port); the first that answers serves the request.
    type: list
    elements: str
    required: true
  token:
    description: Bearer token of the cluster. Empty where the cluster asks for none.
    type: str
    default: ''
  request_timeout:
    description: Seconds for one HTTP exchange.
    type: float
    default: 5.0
  patience:
    description: Seconds in all for one call, every endpoint and repetition included.
    type: float
    default: 10.0
requirements:
  - Python 3.8 or newer on the host, nothing else
author:
  - The dengine authors (@dengine)
"""
