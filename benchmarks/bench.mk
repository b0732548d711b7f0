# Benchmarks on this machine's CPU; see benchmarks/README.md. On a machine that does nothing else.

.PHONY: bench-cpu bench-llama

THROUGHPUT := $(PY) benchmarks/throughput.py

bench-cpu: setup ## Measure throughput, cost at rest, router, KV transfer and sparse attention into benchmarks/results
	@$(SAY) "Throughput, 16 at once"; $(THROUGHPUT) --concurrency 16 --rounds 2
	@$(SAY) "Throughput, 16 at once, a third round"; $(THROUGHPUT) --concurrency 16 --rounds 1 --append
	@$(SAY) "Throughput, 1 at a time"; $(THROUGHPUT) --concurrency 1 --append
	@$(SAY) "Throughput, 64 at once, with transformers in bf16"
	@$(THROUGHPUT) --concurrency 64 --rounds 1 --append \
	    --contenders "nanodeploy bf16" "served, no prefill" "transformers bf16"
	@$(SAY) "Throughput, 64 at once, the others"
	@for round in 1 2; do $(THROUGHPUT) --concurrency 64 --rounds 1 --append --without "transformers bf16"; done
	@$(SAY) "Cost at rest"; $(PY) benchmarks/at_rest.py
	@$(SAY) "Router"; $(PY) benchmarks/router.py
	@$(SAY) "KV transfer"; $(PY) benchmarks/kv_transfer.py
	@$(SAY) "Speculation"; $(PY) benchmarks/speculation.py
	@$(SAY) "Sparse attention"; $(PY) benchmarks/sparse_attention.py
	@$(SAY) "Sparse attention"; $(PY) benchmarks/sparse_attention.py

bench-llama: setup ## Build llama-cpp-python in the cache folder, for benchmarks/throughput.py
	@$(PY) benchmarks/throughput.py --install-llama
