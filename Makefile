SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# A plain build needs Go and nothing else; the eBPF objects are committed.
GO        ?= go
VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS   := -s -w -X main.version=$(VERSION)
GOLANGCI  := v2.15.0
CLANG     := 19
# A count, not a time: up to Go 1.26 a time that ends may fail as "context
# deadline exceeded" (golang/go#75804, mended in 1.27).
FUZZTIME  ?= 50000x
BENCHTIME ?= 1s
BACKEND   ?= auto
ROUNDS    ?= 5
PODS      ?= 110
BURST     ?= 110
CLUSTERS  ?= 5000
DURATION  ?= 2m
SCALE     ?= 0.5
OPEN      ?= 10000
SHORT     ?= 50000
MODES     ?=
LIMIT     ?= 10m
KERNELS   ?= 5.10 6.1 6.12 newest
SETUP     := tests/setup/setup.sh
ARCH      ?= $(shell $(GO) env GOARCH)
OUT       ?= bin/sluice-agent_$(ARCH).tar
IMAGE     ?= sluicemesh/sluice-agent:$(shell sed -n 's/^appVersion: "\(.*\)"/\1/p' deploy/helm/sluice/Chart.yaml)
REVISION  ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
EPOCH     ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
# Packages whose tests gain from the race detector and disturb nobody, so that
# they run side by side. The others make namespaces and attach programs: one
# after the other.
PARALLEL  := ./cmd/... ./deploy/... ./pkg/podwatch/... ./pkg/xds/...
# Packages whose tests have a target of their own.
APART     := ./tests/apps

##@ Try it
demo: build tools-demo ## Bookshop behind real Envoys, step by step (BACKEND=ebpf|iptables|auto, KEEP=1)
	bin/demo run --backend=$(BACKEND) $(if $(KEEP),--keep)

demo-clean: bin/demo ## Remove what KEEP=1 make demo, or a killed demo, left running
	bin/demo clean

##@ Build
build: bin/sluice-agent bin/sluice-cni bin/demo bin/bookshop ## All programs, static, into bin/

bin/sluice-agent: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/agent
bin/sluice-cni: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/cni
bin/demo: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./deploy/demo/run
bin/bookshop: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./deploy/demo/bookshop
FORCE:

image: ## The agent's image as a tar, without Docker: bin/sluice-agent_ARCH.tar (ARCH=amd64|arm64 OUT=FILE)
	@mkdir -p bin/image/$(ARCH) $(dir $(OUT))
	CGO_ENABLED=0 GOOS=linux GOARCH=$(ARCH) $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/image/$(ARCH)/ ./cmd/agent ./cmd/cni
	mv bin/image/$(ARCH)/agent bin/image/$(ARCH)/sluice-agent
	mv bin/image/$(ARCH)/cni bin/image/$(ARCH)/sluice-cni
	$(GO) run ./deploy/image -arch $(ARCH) -bin bin/image/$(ARCH) -cache .tools/image $(if $(ROOTFS),-rootfs $(ROOTFS),-o $(OUT) -name $(IMAGE)) \
		-version $(VERSION) -revision $(REVISION) -epoch $(EPOCH)

image-bookshop: ## The bookshop's image as a tar, for deploy/demo/kubernetes: bin/bookshop_ARCH.tar (ARCH=amd64|arm64)
	@mkdir -p bin/image/$(ARCH)
	CGO_ENABLED=0 GOOS=linux GOARCH=$(ARCH) $(GO) build -trimpath -o bin/image/$(ARCH)/bookshop ./deploy/demo/bookshop
	$(GO) run ./deploy/image -arch $(ARCH) -program bin/image/$(ARCH)/bookshop -o $(OUT) -name $(IMAGE) \
		-version $(VERSION) -revision $(REVISION) -epoch $(EPOCH)

image-bookshop: OUT = bin/bookshop_$(ARCH).tar
image-bookshop: IMAGE = sluicemesh/bookshop:e2e

manifest: ## Renew deploy/manifests/sluice.yaml: the chart with its defaults, for kubectl
	@$(SETUP) helm
	$(GO) test -count=1 -run '^Test(Manifest|Readme)$$' ./tests/chart -update

tools: ## Envoy and the CNI plugins into .tools/, iptables, nft and ip from apt where they lack
	$(SETUP) envoy cni iptables nft iproute

tools-demo:
	$(SETUP) envoy cni $(if $(filter iptables,$(BACKEND)),iptables)
	$(if $(filter auto,$(BACKEND)),OPTIONAL=1 $(SETUP) iptables)

generate: ## Compile bpf/ into pkg/redirect/bpf (clang 19; the results are committed)
	$(SETUP) clang
	$(GO) generate ./pkg/redirect/bpf/...

##@ Check
test: ## Every test that this machine can run; what it lacks is named (CI=1: fails)
	OPTIONAL=1 $(SETUP) envoy cni iptables nft iproute gcc helm prometheus
	@missing=$$(mktemp); export SLUICE_TEST_MISSING=$$missing; \
	rc=0; for tests in test-parallel test-serial; do $(MAKE) $$tests || rc=1; done; \
	sort $$missing | uniq -c | sed -E 's/^ *([0-9]+) /skipped \1 times for want of /'; rm -f $$missing; exit $$rc

test-parallel: ## Only what needs no namespaces of its own: race detector on
	@race=-race; command -v gcc >/dev/null || { race=; echo "no gcc: race detector off" >&2; }; \
	set -x; $(GO) test $$race -count=1 -timeout 15m $(PARALLEL)

test-serial: ## Only what makes namespaces, attaches programs, runs Envoys (root)
	$(GO) test -count=1 -p 1 -timeout 30m $$($(GO) list ./... | grep -vxF "$$($(GO) list $(PARALLEL) $(APART))")

test-apps: ## Real servers and their clients, directly and through two Envoys (APPS=redis,nginx,... BACKEND=ebpf|iptables; root)
	OPTIONAL=1 $(SETUP) envoy cni iptables iproute apps
	APPS='$(APPS)' BACKEND='$(filter-out auto,$(BACKEND))' $(GO) test -count=1 -v -timeout 20m ./tests/apps | grep -v '^=== '

test-kernels: bin/kernels-run ## Boot the kernels that people run, try Sluice on each (KERNELS='6.1 newest' ALL=1: the whole root tier, or RUN=regexp)
	@$(SETUP) qemu iptables nft $(addprefix kernel-,$(KERNELS))
	bin/kernels-run -kernels '$(KERNELS)' $(if $(RUN),-run '$(RUN)',$(if $(ALL),-all))

verify: bin/kernels-run ## Have these kernels verify every eBPF program, compare the counts (KERNELS=..., UPDATE=1: renew them)
	@$(SETUP) qemu iptables nft $(addprefix kernel-,$(KERNELS))
	bin/kernels-run -kernels '$(KERNELS)' -verify $(if $(UPDATE),-update)
	$(if $(UPDATE),$(GO) test -count=1 -run '^TestDocument$$' ./tests/kernels -update)

bin/kernels-run: FORCE
	$(GO) build -trimpath -o $@ ./tests/kernels

e2e: ## Helm install, calls and faults under load on a real cluster: KUBECONFIG's, or one of its own (PARTS='scenarios chart rights' RUN=regexp BACKEND=ebpf|iptables KEEP=1)
	PARTS='$(PARTS)' RUN='$(RUN)' BACKEND='$(filter-out auto,$(BACKEND))' KEEP='$(KEEP)' tests/kube/run.sh

fuzz: ## Each fuzz target FUZZTIME times (50000x)
	@set -e; grep -rnoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' . | \
	sed -E 's|^(.*)/[^/]*:[0-9]+:func (.*)$$|\1 \2|' | sort -u | while read -r dir name; do \
	echo "fuzz $$dir $$name"; $(GO) test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$dir" </dev/null; done

bench: ## All Go benchmarks for BENCHTIME each (1s)
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) -timeout 30m ./cmd/cni ./pkg/...

bench-xds: ## The xDS server beside go-control-plane's, on one core (ROUNDS=5 PODS=110 CLUSTERS=5000)
	cd tests/bench && $(GO) build -trimpath -o ../../bin/bench-xds .
	@core=$$(awk '/^Cpus_allowed_list/ {split($$2, a, /[-,]/); print a[1]}' /proc/self/status); \
	command -v taskset >/dev/null && pin="taskset -c $$core" || echo "no taskset: not pinned to a core" >&2; \
	set -x; $$pin bin/bench-xds -rounds $(ROUNDS) -pods $(PODS) -clusters $(CLUSTERS)

bench-cni: PODS = 200
bench-cni: ROUNDS = 300
bench-cni: ## What sluice-cni adds to a pod's start, both backends (ROUNDS=300 PODS=200 BURST=110)
	$(SETUP) cni iptables iproute
	$(GO) test -count=1 -v -timeout 60m -run ADD ./tests/cnibench -rounds $(ROUNDS) -pods $(PODS) -burst $(BURST)

soak: ## Mixed traffic while pods come and go and agent and proxies are killed; nothing may fail without a cause, nothing grow (DURATION=2m BACKEND=ebpf|iptables)
	$(SETUP) envoy cni iptables iproute
	BACKEND=$(filter-out auto,$(BACKEND)) $(GO) test -count=1 -v -timeout 0 ./tests/soak -duration $(DURATION)

bench-redirect: ROUNDS = 20
bench-redirect: PODS = 50,200
bench-redirect: PARTS = all,pods,open,short,programs
bench-redirect: ## What redirection costs: direct, Envoys by hand, iptables, eBPF (ROUNDS=20 SCALE=0.5 PODS=50,200 OPEN=10000 SHORT=50000 PARTS=all,pods,open,short,programs MODES= LIMIT=10m)
	$(SETUP) envoy iptables iproute
	$(GO) test -count=1 -v -timeout 180m -run Redirect ./tests/redirectbench -rounds $(ROUNDS) -scale $(SCALE) -pods $(PODS) -open $(OPEN) -short-connections $(SHORT) -parts $(PARTS) -modes '$(MODES)' -limit $(LIMIT)

lint: .tools/bin/golangci-lint-$(GOLANGCI) ## golangci-lint, pinned, built by the Go toolchain
	$< run ./...
	cd tests/bench && ../../$< run ./...

.tools/bin/golangci-lint-$(GOLANGCI):
	@echo "building golangci-lint $(GOLANGCI) (a few minutes, once)"
	@mkdir -p $(@D)
	cd tests/setup && GOFLAGS= GOBIN=$(CURDIR)/$(@D) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI)
	mv $(@D)/golangci-lint $@

fmt: .tools/bin/golangci-lint-$(GOLANGCI) ## Format Go and C
	$< fmt ./...
	@if command -v clang-format-$(CLANG) >/dev/null; then set -x; clang-format-$(CLANG) -i $(CSOURCES); \
	else echo "no clang-format-$(CLANG): C is left as it is" >&2; fi

CSOURCES = $(shell git ls-files 'bpf/*.c' 'bpf/*.h' ':!bpf/headers')

generate-check: ## The committed eBPF objects are what bpf/ compiles to, and C is formatted
	@$(SETUP) clang || { [ -z "$$CI" ] && echo "skipped: generate-check needs clang-$(CLANG)"; exit $${CI:+1}; }
	@if command -v clang-$(CLANG) >/dev/null; then set -ex; \
	clang-format-$(CLANG) --dry-run --Werror $(CSOURCES); \
	$(GO) generate ./pkg/redirect/bpf/...; git diff --exit-code --stat -- 'pkg/redirect/bpf/*_bpfel*'; fi

mod-check: ## go.mod and go.sum are tidy and what they name is what was downloaded
	$(GO) mod tidy -diff
	$(GO) mod verify

checkall: mod-check lint generate-check test ## Everything that a change must pass

##@ Other
clean: ## Remove bin/ (and .tools/ with ALL=1)
	rm -rf bin $(if $(ALL),.tools)

help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	/^[a-z][a-z-]*:.*## / {sub(/:.*/, "", $$1); printf "  %-16s %s\n", $$1, $$2}' Makefile

.PHONY: FORCE bench bench-cni bench-redirect bench-xds build checkall clean demo demo-clean e2e fmt fuzz generate generate-check help image image-bookshop lint manifest mod-check soak test test-apps test-kernels test-parallel test-serial tools tools-demo verify
