# Every target works on a fresh Debian or Ubuntu machine with Rust, a C compiler and Python.
MODEL := smollm2-135m-instruct
# All that the tests use.
MODELS := $(MODEL) gemma-3-270m
DEMO := examples/news-summaries
PYTHON := target/venv/bin/python
# Exported, so that cargo and what is built by it agree, whoever set it.
export CARGO_TARGET_DIR ?= target
export TIDEMILL := $(CARGO_TARGET_DIR)/release/tidemill
# rustup puts cargo where only a login shell looks.
export PATH := $(PATH):$(or $(CARGO_HOME),$(HOME)/.cargo)/bin

.DEFAULT_GOAL := help
.PHONY: help setup build models data demo demo-kafka kafka cuda chaos burst bench gpu-bench peers test

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: ## check for cargo, cc, python3 and pip; install what is missing
	@sh scripts/setup.sh

build: setup ## build target/release/tidemill
	@sh scripts/cuda.sh detect >/dev/null
	@echo "build: release build (some minutes when cold)"
	@cargo build --release --locked -p tidemill --bin tidemill

# The dev binary, so that `make test` needs no release build.
models: setup ## fetch the models of the tests into the cache
	@echo "models: fetching $(MODELS) if they are not there (builds the dev binary first)"
	@cargo build --locked -p tidemill --bin tidemill
	@for model in $(MODELS); do cargo run --locked --quiet -p tidemill --bin tidemill -- models pull $$model || exit 1; done

data: setup ## fetch 300 real news articles into data/articles.parquet
	@sh scripts/venv.sh
	@$(PYTHON) scripts/fetch_news.py

demo: build ## set up, fetch the model, build, summarize the news of the example
	@$(TIDEMILL) models pull $(MODEL)
	@$(TIDEMILL) run $(DEMO)/pipeline.yaml
	@if sh scripts/venv.sh; then $(PYTHON) scripts/show_summaries.py $(DEMO)/out/summaries; \
	else echo "demo: the summaries are Parquet files in $(DEMO)/out/summaries"; fi

demo-kafka: build ## start a broker, summarize articles topic to topic, show them, stop
	@$(TIDEMILL) models pull $(MODEL)
	@sh scripts/demo_kafka.sh $(TIDEMILL)

# The demo fetches its broker itself, where it is neither given one nor finds docker.
kafka: setup ## fetch the broker and the schema registry of the tests into the cache
	@sh scripts/kafka.sh fetch
	@sh scripts/registry.sh fetch

cuda: setup ## fetch the compiler of the kernels for GPUs into the cache
	@sh scripts/cuda.sh fetch >/dev/null

burst: build ## let 100,000 records arrive while the model is slow; writes out/burst.svg
	@python3 scripts/burst.py $(TIDEMILL)

chaos: kafka ## kill, cut off and fool pipelines and a broker, and print what happened
	@cargo test --locked --quiet -p tidemill-tests --test kafka_chaos --test kafka_simulation -- --nocapture --test-threads 1

bench: build ## measure the engine and the offline job beside the machine's own peak
	@$(TIDEMILL) models pull $(MODEL)
	@python3 scripts/offline_job.py
	@mkdir -p out
	@$(TIDEMILL) bench engine --json out/bench-engine.json
	@$(TIDEMILL) bench offline --json out/bench-offline.json

gpu-bench: build ## measure random weights on a GPU beside its peaks, the goals and a peer (PEER_PYTHON has torch)
	@mkdir -p out
	@python3 scripts/gpu_bench.py --python "$(or $(PEER_PYTHON),python3)" --json out/gpu-bench.json

peers: build ## run Tidemill beside other engines that are installed (scripts/peers/README.md)
	@$(TIDEMILL) models pull $(MODEL)
	@python3 scripts/offline_job.py
	@mkdir -p out
	@python3 scripts/peers/compare.py --json out/peers.json

# The compiler comes first, so that nothing is built without it.
test: setup cuda models kafka ## set up and run every check and test that needs no GPU
	@echo "test: format"
	@cargo fmt --all --check
	@echo "test: lints (some minutes when cold)"
	@cargo clippy --locked --workspace --all-targets -- -D warnings
	@echo "test: tests"
	@bash -o pipefail -c 'cargo test --locked --workspace -- --quiet 2>&1 | tee $(CARGO_TARGET_DIR)/test.log'
	@echo "test: kernels for GPUs, under AddressSanitizer"
	@sh scripts/asan.sh
	@awk '/^test result:/ { passed += $$4; failed += $$6 } END { print passed " passed, " failed " failed" }' $(CARGO_TARGET_DIR)/test.log
