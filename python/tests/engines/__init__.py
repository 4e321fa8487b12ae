"""Real vLLM engines for the tests: how to configure, start, drive and compare them."""
