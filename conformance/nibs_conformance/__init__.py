"""The conformance suite of nibs: what a backend claims, proven on this machine.

    python -m pytest --pyargs nibs_conformance --nibs-backend numpy

It needs pytest, pluggy and NumPy, and knows no backend by name. Nothing heavy is imported here:
the package is also a pytest plugin, which every pytest run of its environment loads.
"""

from __future__ import annotations

__version__ = "0.1.0"
