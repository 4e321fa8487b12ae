"""A Triton backend named `cpu` that compiles nothing.

vLLM's V2 model runner needs Triton, and vLLM's CPU build takes Triton into use only if it has a
backend of this name. With TRITON_INTERPRET=1 every kernel runs in Triton's own interpreter, so
nothing is ever compiled.
"""
