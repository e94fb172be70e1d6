"""Synthetic Verilog problems in the style of spec-to-RTL benchmarks: what the embedded default trains and is judged on.

Every problem is a specification, a reference module and a test bench, drawn from parametrised families and simulated
when it is made. Nothing here is taken from a benchmark.
"""
