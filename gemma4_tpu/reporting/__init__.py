"""Lays out what is shown: tables, pages, plots, and rows or prompts before a run. Importing it brings no JAX."""
