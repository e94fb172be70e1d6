"""Physical ceilings of slices, throughputs compared with them, and the cost of runs and of served tokens. Imports no
JAX.
"""
