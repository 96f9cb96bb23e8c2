"""``python -m longswift``."""

from __future__ import annotations

from longswift.cli.main import main

main()
