"""The demo: the same chat traffic on stock vLLM without and with kvtide, side by side.

Run it with the Python of a vLLM environment, from the repository root: `python -m bench.demo`.
"""
