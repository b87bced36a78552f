"""The sweeps behind the findings: what was run, how, and what came of it."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the checkout: what is published lies there, from whichever folder one starts
