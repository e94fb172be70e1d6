"""Verilog completions: extraction, sandboxed simulation with Icarus Verilog, verdicts."""
