"""The sweeps behind the findings: what was run, how, and what came of it."""

from engine.files import ROOT as ROOT  # of the checkout: what is published lies there, from whichever folder one starts
