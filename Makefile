# make help lists the targets.

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 30s
BENCH    ?= .

# The linters, by exact version: an upgrade is a commit of its own.
GOFUMPT       := go run mvdan.cc/gofumpt@v0.12.0
STATICCHECK   := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOLANGCI_LINT := go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

.PHONY: build test check demo bench fuzz deps clean help
.DEFAULT_GOAL := build

build: ## build bin/holdfast and bin/holdfast-guard (the default)
	CGO_ENABLED=0 go build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/ ./cmd/...

test: deps ## run every test with the race detector; a missing tool fails, nothing is skipped
	go test -race -timeout 20m -p 2 ./...

check: deps ## format, vet, lint; what a change must pass besides the tests
	go mod verify
	go vet ./...
	@echo 'gofumpt -l .'; files=$$($(GOFUMPT) -l .) && test -z "$$files" || { echo "not formatted: $$files"; exit 1; }
	@echo 'go fix -diff ./...'; diff=$$(go fix -diff ./...); test -z "$$diff" || { echo "$$diff"; exit 1; }
	$(STATICCHECK) ./...
	$(GOLANGCI_LINT) run ./...
	shellcheck .ci/run scripts/* e2e/testdata/*.sh

demo: ## back up, change, diff, mount, serve and restore a real guest's disk
	@scripts/install-deps demo
	@$(MAKE) --no-print-directory build
	@scripts/demo

bench: ## run the benchmarks, then scripts/bench; BENCH=regexp picks some, without the latter
	go test -run '^$$' -bench '$(BENCH)' -benchmem ./...
ifeq ($(BENCH),.)
	scripts/bench
endif

fuzz: ## run each fuzz target for FUZZTIME (30s)
	scripts/fuzz $(FUZZTIME)

deps: ## install the Debian packages that tests, lint and demo miss
	@scripts/install-deps test

clean: ## remove what make built
	rm -rf bin .cache

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
