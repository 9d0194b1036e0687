"""Joint-embedding predictive architectures: six slots, and small parts that fit them.

Nothing is imported here, so that a loader worker or a `--help` pays only for what it uses. Start at
``jepa_kit.recipe`` (the equations), ``jepa_kit.config`` (from YAML to a checked config) and
``jepa_kit.registry`` (how a part gets its name).
"""

__version__ = "0.1.0"
