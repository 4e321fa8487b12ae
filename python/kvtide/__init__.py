"""kvtide: vLLM's KV cache in a host memory pool.

`kvtide.vllm` holds the connector that vLLM loads by `--kv-transfer-config`; `kvtide._native` is the
engine.
"""

from kvtide._native import ConfigError, KvtideError, __version__

__all__ = ["ConfigError", "KvtideError", "__version__"]
