"""Measurements. `python -m bench.models` compares whole models; the harness for single ops comes with the kernels."""
