"""A vLLM plugin: what users have on GPUs, switched on in vLLM's CPU build.

vLLM loads it in every process. Async scheduling is on by default on GPUs, and the CPU platform
switches it off whatever the flags say; KVTIDE_REQUIRE_ASYNC_SCHEDULING=0|1 decides here.
"""

import os


def register() -> None:
    """Called by vLLM, possibly more than once in a process."""
    wanted = os.environ.get("KVTIDE_REQUIRE_ASYNC_SCHEDULING")
    if wanted is not None:
        force_async_scheduling(wanted == "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        # The only Triton kernel of this build that does not run in the interpreter.
        from vllm.v1.sample.ops import topk_topp_sampler

        topk_topp_sampler.HAS_TRITON = False


def force_async_scheduling(wanted: bool) -> None:
    """Sets it after the platform has."""
    from vllm.config import VllmConfig
    from vllm.platforms.cpu import CpuPlatform

    if getattr(CpuPlatform, "kvtide_tests", False):
        return
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type[CpuPlatform], config: VllmConfig) -> None:
        original(cls, config)
        config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    CpuPlatform.kvtide_tests = True
