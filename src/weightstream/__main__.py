"""`python -m weightstream`."""

from __future__ import annotations

from weightstream.cli import main

main()
