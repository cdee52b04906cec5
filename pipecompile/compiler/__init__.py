"""Compiles a call into stages: options, cached captures, compilation, rehearsal and report."""
