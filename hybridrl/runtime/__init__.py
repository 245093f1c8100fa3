"""Ray actors, calls with timeouts, placement and the typed worker groups; the only package that
imports ray.
"""
