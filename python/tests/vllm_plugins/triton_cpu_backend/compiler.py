"""The half of a backend that would compile."""

from typing import Any

from triton.backends.compiler import BaseBackend


class CpuBackend(BaseBackend):
    """Refuses to compile."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise RuntimeError("the tests' Triton backend only interprets; set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, *rest: Any) -> None:
        raise RuntimeError("the tests' Triton backend only interprets; set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """No dialects."""

    def get_module_map(self) -> dict[str, Any]:
        return {}

    def get_codegen_implementation(self, *rest: Any) -> dict[str, Any]:
        return {}

    def pack_metadata(self, metadata: Any) -> tuple[Any, ...]:
        return ()
