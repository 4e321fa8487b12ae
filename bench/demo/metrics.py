"""Reads counters from a server's `/metrics` page (Prometheus text format)."""

import re
from dataclasses import dataclass

# name{label="value",…} value [timestamp]; values may hold escaped quotes.
SAMPLE = re.compile(
    r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>[^\s]+)(?:\s+-?\d+)?$"
)
LABEL = re.compile(r'(?P<key>[A-Za-z_]\w*)="(?P<value>(?:[^"\\]|\\.)*)"')

GPU_QUERIES = "vllm:prefix_cache_queries_total"
GPU_HITS = "vllm:prefix_cache_hits_total"
EXTERNAL_HITS = "vllm:external_prefix_cache_hits_total"
TIER_HITS = "kvtide_hit_tokens_total"
LOADED_TOKENS = "kvtide_loaded_tokens_total"
SAVED_BYTES = "kvtide_saved_bytes_total"


@dataclass(frozen=True)
class Sample:
    """One line of the page."""

    name: str
    labels: dict[str, str]
    value: float


def parse(page: str) -> list[Sample]:
    """All samples of a page; comments, blanks and lines of other formats are passed over."""
    samples = []
    for line in page.splitlines():
        if line.startswith("#") or not (match := SAMPLE.match(line.strip())):
            continue
        try:
            value = float(match["value"])
        except ValueError:
            continue
        labels = {found["key"]: found["value"] for found in LABEL.finditer(match["labels"] or "")}
        samples.append(Sample(match["name"], labels, value))
    return samples


@dataclass(frozen=True)
class Counters:
    """What the report needs from a page. Tokens and bytes since the server started."""

    queried_tokens: float
    gpu_hit_tokens: float
    external_hit_tokens: float
    tier_hit_tokens: dict[str, float]
    loaded_tokens: float
    saved_bytes: float
    # False where no kvtide counter is on the page: not zero, but unknown.
    has_kvtide: bool

    @classmethod
    def from_page(cls, page: str) -> "Counters":
        """Sums each counter over engines and ranks."""
        samples = parse(page)

        def total(name: str) -> float:
            return sum(sample.value for sample in samples if sample.name == name)

        tiers: dict[str, float] = {}
        for sample in samples:
            if sample.name == TIER_HITS:
                tier = sample.labels.get("tier", "unknown")
                tiers[tier] = tiers.get(tier, 0.0) + sample.value
        return cls(
            queried_tokens=total(GPU_QUERIES),
            gpu_hit_tokens=total(GPU_HITS),
            external_hit_tokens=total(EXTERNAL_HITS),
            tier_hit_tokens=tiers,
            loaded_tokens=total(LOADED_TOKENS),
            saved_bytes=total(SAVED_BYTES),
            has_kvtide=any(sample.name.startswith("kvtide_") for sample in samples),
        )

    def since(self, before: "Counters") -> "Counters":
        """What was added after `before` was read from the same server."""
        return Counters(
            queried_tokens=self.queried_tokens - before.queried_tokens,
            gpu_hit_tokens=self.gpu_hit_tokens - before.gpu_hit_tokens,
            external_hit_tokens=self.external_hit_tokens - before.external_hit_tokens,
            tier_hit_tokens={
                tier: tokens - before.tier_hit_tokens.get(tier, 0.0)
                for tier, tokens in self.tier_hit_tokens.items()
            },
            loaded_tokens=self.loaded_tokens - before.loaded_tokens,
            saved_bytes=self.saved_bytes - before.saved_bytes,
            has_kvtide=self.has_kvtide,
        )

    def hit_rate(self) -> dict[str, float]:
        """Share of all prompt tokens found per tier; what is missing to 1 was computed.

        One denominator for all tiers, so that the shares add up.
        """
        tiers = {"host": 0.0, **self.tier_hit_tokens}
        rates = {"gpu": self.gpu_hit_tokens, **tiers}
        return {tier: tokens / max(self.queried_tokens, 1.0) for tier, tokens in rates.items()}
