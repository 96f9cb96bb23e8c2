"""The ``longswift`` command: one file a command, no logic; what they run lives in ``eval``."""
