# The two commands for everybody are `make demo` and `make test`. Both install what is missing first.

SHELL := /bin/bash
# A shell that has not read ~/.cargo/env doesn't see a fresh toolchain.
export PATH := $(PATH):$(HOME)/.cargo/bin

# Runs a command with the variables that point cargo to the RocksDB that is compiled once for all builds.
WITH_ROCKSDB := scripts/rocksdb.sh

# Further arguments for the program: `make demo ARGS="--tape trades.csv"`.
ARGS ?=

.PHONY: help bench bench-peers bugs demo drill dev cluster cluster-stop test docker-test verify fix deny setup check histories sim sim-stack failpoints power-loss damage

help: ## Tells what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: setup ## Settles a tape on a cluster of three processes while leaders are killed
	$(WITH_ROCKSDB) cargo run --locked --release -p verdict -- demo $(ARGS)

check: ## Visits every state of small clusters; ARGS=--full the large ones, ARGS=--list tells them
	cargo run --locked --release -p verdict-check -- $(ARGS)

drill: setup ## Lets things die and break while trades settle, and reports: `make drill ARGS="kill-coordinator --out r.html"`
	$(WITH_ROCKSDB) cargo build --locked --release -p verdict-disk
	$(WITH_ROCKSDB) cargo run --locked --release -p verdict -- drill $(or $(ARGS),kill-coordinator)

bench: setup ## Measures trades per second, latencies and costs on three processes: `make bench ARGS="--case unary-64,stream-1"`
	$(WITH_ROCKSDB) cargo run --locked --release -p verdict -- bench $(ARGS)

sim: ## Simulates clusters under faults, for SECONDS=60 or SEEDS=10000; SEED=123 replays one with its trace, TWICE=1 runs each twice
	cargo run --locked --quiet --release -p verdict-sim -- $(if $(SEED),--seed $(SEED),$(if $(SEEDS),--seeds $(SEEDS)) $(if $(SECONDS),--seconds $(SECONDS))) $(if $(TWICE),--twice) $(ARGS)

bugs: ## Puts each bug of bugs/ into a copy of the tree, and shows the test that catches it; ONLY=B07 those of one class
	scripts/bugs.sh $(ONLY) $(ARGS)

bench-peers: ## Measures PostgreSQL (two-phase commit) and etcd beside Verdict, half an hour; ARGS=--quick, ARGS="--only etcd"
	@scripts/bench-peers.sh $(ARGS)

dev: setup ## Starts a durable cluster of three nodes in one process, for development against it
	$(WITH_ROCKSDB) cargo run --locked --release -p verdict -- dev $(ARGS)

cluster: ## Starts nine containers: three coordinators, two shards of three replicas (docker/README.md)
	@docker/up.sh $(ARGS)

cluster-stop: ## Stops them; what they have stored stays
	@docker/down.sh $(ARGS)

docker-test: ## Tries the containers with kills and a cut, in a cluster of their own; skips where there is no Docker
	@docker/test.sh $(ARGS)

test: ## Everything that CI checks; installs what is missing first
	@scripts/setup.sh --test
	@scripts/verify.sh

verify: ## The gate: format, lints, rules, documentation, tests; changes nothing
	@scripts/verify.sh

fix: ## Rewrites what can be mended by machine: format and lints
	$(WITH_ROCKSDB) cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all
	cargo fmt --manifest-path peers/Cargo.toml

histories: setup ## What clients see while nodes are killed and paused, checked for strict serializability (SECONDS=300)
	$(WITH_ROCKSDB) cargo build --locked -p verdict
	VERDICT_HISTORY_SECONDS=$(or $(SECONDS),300) $(WITH_ROCKSDB) cargo test --locked -p verdict-tests --test histories -- --nocapture

sim-stack: setup ## The real stack in a simulated world: SEEDS=100 of them, or SEED=17 alone with its trace
	$(WITH_ROCKSDB) cargo run --locked -p verdict-simnet -- $(if $(SEED),seed $(SEED),seeds --count $(or $(SEEDS),100)) $(ARGS)

failpoints: setup ## Kills processes at every failpoint in every role, under load; ARGS="--only vote --kills 50"
	$(WITH_ROCKSDB) cargo build --locked -p verdict -p verdict-tests --bins
	$(WITH_ROCKSDB) cargo run --locked -p verdict-tests --bin failpoints -- $(ARGS)

power-loss: setup ## Cuts the power of one, two and all nodes under load, LOSSES=100 times each
	$(WITH_ROCKSDB) cargo build --locked -p verdict -p verdict-disk
	VERDICT_POWER_LOSSES=$(or $(LOSSES),100) $(WITH_ROCKSDB) cargo test --locked -p verdict-tests --test power_loss no_loss -- --nocapture

damage: setup ## Flips and cuts bytes in every kind of file of a node, DAMAGES=300 times
	VERDICT_DAMAGES=$(or $(DAMAGES),300) $(WITH_ROCKSDB) cargo test --locked -p verdict-raft --test cluster damage_anywhere -- --nocapture

deny: ## Licences, sources and advisories of all dependencies; installs cargo-deny first (minutes)
	@cargo deny --version > /dev/null 2>&1 || cargo install --locked cargo-deny
	@scripts/deny.sh

setup:
	@scripts/setup.sh
