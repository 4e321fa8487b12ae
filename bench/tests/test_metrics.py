"""The `/metrics` parser reads what vLLM and kvtide print."""

from bench.demo.metrics import Counters, parse

PAGE = r"""
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="demo"} 1000.0
vllm:prefix_cache_queries_created{engine="0",model_name="demo"} 1.7953399199572642e+09
vllm:prefix_cache_hits_total{engine="0",model_name="demo"} 320.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="demo"} 480.0
kvtide_hit_tokens_total{engine="0",model_name="demo",tier="host"} 448.0
kvtide_hit_tokens_total{engine="0",model_name="demo",tier="disk"} 32.0
kvtide_loaded_tokens_total{engine="0",mode="layered",model_name="demo"} 400.0
kvtide_loaded_tokens_total{engine="0",mode="async",model_name="demo"} 80.0
kvtide_saved_bytes_total{engine="0",model_name="demo"} 1.5e+06
"""


def test_labels_with_escapes_and_braces_are_read() -> None:
    (sample,) = parse(r'a_total{path="C:\\x\"}y",other="{}"} 3 1700000000000')
    assert sample.labels == {"path": r"C:\\x\"}y", "other": "{}"}
    assert sample.value == 3


def test_special_values_and_bare_names_are_read() -> None:
    values = {
        sample.name: sample.value for sample in parse("up 1\nlimit +Inf\nnothing here at all")
    }
    assert values == {"up": 1.0, "limit": float("inf")}


def test_counters_are_summed_over_labels_but_tiers_kept_apart() -> None:
    counters = Counters.from_page(PAGE)
    assert counters.queried_tokens == 1000
    assert counters.gpu_hit_tokens == 320
    assert counters.external_hit_tokens == 480
    assert counters.loaded_tokens == 480
    assert counters.saved_bytes == 1_500_000
    assert counters.tier_hit_tokens == {"host": 448, "disk": 32}
    assert counters.has_kvtide


def test_hit_rates_share_one_denominator() -> None:
    assert Counters.from_page(PAGE).hit_rate() == {"gpu": 0.32, "host": 0.448, "disk": 0.032}


def test_stock_page_reports_no_kvtide_and_a_host_rate_of_zero() -> None:
    stock = "\n".join(line for line in PAGE.splitlines() if not line.startswith("kvtide_"))
    counters = Counters.from_page(stock)
    assert not counters.has_kvtide
    assert counters.hit_rate() == {"gpu": 0.32, "host": 0.0}


def test_only_growth_since_the_first_reading_counts() -> None:
    before = Counters.from_page(PAGE)
    after = Counters.from_page(PAGE.replace("448.0", "548.0").replace("1000.0", "1400.0"))
    grown = after.since(before)
    assert grown.tier_hit_tokens == {"host": 100, "disk": 0}
    assert grown.hit_rate()["host"] == 0.25
    assert grown.loaded_tokens == 0


def test_idle_server_divides_by_nothing() -> None:
    assert Counters.from_page("").hit_rate() == {"gpu": 0.0, "host": 0.0}
