# Sallyport. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
CACHE      := $(CURDIR)/.cache
TOOLS      := $(CACHE)/bin
BIN        := $(CURDIR)/bin/sallyport

# Pinned tools; see docs/HACKING.md on raising them.
VERSITYGW   := github.com/versity/versitygw/cmd/versitygw@v1.8.0
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0

# How long each fuzz target runs: `make fuzz FUZZTIME=10m`.
FUZZTIME   ?= 30s
# Those that `make test` runs for some seconds: what reads a caller's bytes first.
BRIEF_FUZZ := FuzzFrame FuzzAnalyze FuzzMask
# What `make chaos` plays: a mix, all, or scenarios by name; SEED repeats a run.
SCENARIO   ?= mix
SEED       ?= 0
# How long the mix takes, 10m by itself, or each thing that S27 does, 15s.
CHAOSTIME  ?=
# Packages that are tested, for `make test PKG=./policy/...`.
PKG        ?= ./...

export PATH := $(TOOLS):$(PATH)
# One set of flags for what is built without the race detector: a cold run then
# compiles every dependency twice, not four times.
pure := CGO_ENABLED=0 GOFLAGS='$(GOFLAGS) -trimpath'

# Tests that start processes of the product use this binary, not one of their own.
with_binary := SALLYPORT_BIN=$(BIN)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## install PostgreSQL with apt where it is missing (root, or sudo, which is shown)
	@deploy/deps.sh postgresql

.PHONY: test-deps
test-deps:
	@deploy/deps.sh postgresql cc netns

.PHONY: tools
tools: $(CACHE)/versitygw $(CACHE)/staticcheck ## build the pinned tools that tests and lint need into .cache/bin

# A tool is rebuilt when its pinned version changes: the stamp holds the version.
define tool
.PHONY: $(CACHE)/$(1)
$(CACHE)/$(1):
	@mkdir -p $(TOOLS)
	@[ "$$$$(cat $(CACHE)/$(1).version 2>/dev/null)" = "$(2)" ] && [ -x $(TOOLS)/$(1) ] || \
	  { echo "go install $(2)"; CGO_ENABLED=0 GOBIN=$(TOOLS) go install -trimpath -ldflags='-s -w' $(2) && echo "$(2)" >$(CACHE)/$(1).version; }
endef
$(eval $(call tool,versitygw,$(VERSITYGW)))
$(eval $(call tool,staticcheck,$(STATICCHECK)))
$(eval $(call tool,govulncheck,$(GOVULNCHECK)))

.PHONY: build
build: ## build bin/sallyport
	$(pure) go build -buildvcs=false -ldflags '-X main.version=$(VERSION)' -o $(BIN) ./cmd/sallyport

.PHONY: test
test: test-deps $(CACHE)/versitygw build ## everything, on real PostgreSQL and S3, with the race detector; a brief fuzz at the end
	$(pure) go vet $(PKG)
	$(with_binary) go test -race -timeout 15m -p 2 $(PKG)
	$(if $(filter ./...,$(PKG)),$(pure) go test -count=1 -v -run '^TestSimulation$$' ./raftstore | grep -v level=)
	$(if $(filter ./...,$(PKG)),.ci/fuzz.sh 10s $(BRIEF_FUZZ))

.PHONY: test-large
test-large: test-deps $(CACHE)/versitygw build ## what takes long: fuzzing and chaos at length
	.ci/fuzz.sh 5m
	$(with_binary) SALLYPORT_CHAOS_TIME=15m go test -race -count=1 -timeout 2h -v ./chaos/...

# The program that plays them, a binary with the faults of disks and clocks that
# only it can have, and the build that it is upgraded to.
CHAOS      := $(CACHE)/test/chaos
CHAOSBIN   := $(CACHE)/test/sallyport-chaos

.PHONY: chaos-build
chaos-build: test-deps $(CACHE)/versitygw
	@mkdir -p $(CACHE)/test
	$(pure) go build -buildvcs=false -o $(CHAOS) ./chaos/run
	chaos/run/clock.sh $(CACHE)/test/clock
	$(pure) go build -buildvcs=false -tags chaos -overlay $(CACHE)/test/clock/overlay.json -o $(CHAOSBIN) ./cmd/sallyport
	$(pure) go build -buildvcs=false -tags chaos,chaosnext -overlay $(CACHE)/test/clock/overlay.json -o $(CHAOSBIN)-next ./cmd/sallyport

.PHONY: chaos
chaos: chaos-build ## faults on real nodes under load, 10 minutes; SCENARIO=S3 SEED=… repeats one
	$(CHAOS) -binary $(CHAOSBIN) -scenario $(SCENARIO) -seed $(SEED) $(if $(CHAOSTIME),-time $(CHAOSTIME))

.PHONY: chaos-revoke
chaos-revoke: chaos-build ## 10,000 revocations under faults: not a byte after a complete return; how long each takes
	$(CHAOS) -binary $(CHAOSBIN) -scenario revoke -seed $(SEED)

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME
	.ci/fuzz.sh $(FUZZTIME)

.PHONY: lint
lint: $(CACHE)/staticcheck ## gofmt, vet, staticcheck; govulncheck where its database answers
	$(pure) .ci/lint.sh

.PHONY: bench
bench: deps build ## pgbench direct and through a node: ratio, CPU a transaction, where the time goes
	$(with_binary) $(pure) go run ./bench $(BENCHFLAGS)

.PHONY: bench-raft
bench-raft: ## the event store and the fence against a sync and an echo of the same machine: ratios with their targets; RESULTS=FILE for JSON
	@mkdir -p $(CACHE)/test && rm -f $(CACHE)/test/ratios.json
	$(pure) go test -tags bench -count=1 -timeout 30m -v -run '^TestBenchRaft$$' ./raftstore -args -results=$(CACHE)/test/ratios.json $(BENCHFLAGS)
	$(pure) go test -tags bench -count=1 -timeout 30m -v -run '^TestBenchRaft$$' ./bench -args -results=$(CACHE)/test/ratios.json
	$(if $(RESULTS),cp $(CACHE)/test/ratios.json $(RESULTS))

.PHONY: demo
demo: deps build ## PostgreSQL and three nodes on loopback, the whole story told, left running until Ctrl-C
	$(BIN) demo

.PHONY: demo-once
demo-once: deps build ## the same once, without a terminal; fails if any step is not as it should be
	$(BIN) demo --once

.PHONY: clean
clean: ## remove what was built
	rm -rf $(CURDIR)/bin $(CACHE) $(CURDIR)/demo-data
