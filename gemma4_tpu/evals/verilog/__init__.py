"""Verilog completions: extracts the code, simulates it with Icarus Verilog in a sandbox, gives verdicts."""
