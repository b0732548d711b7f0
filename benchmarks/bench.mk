# Benchmarks on this machine's CPU or GPUs; see benchmarks/README.md. On a machine that does nothing else.

.PHONY: bench-cpu bench-llama bench-gpu bench-gpu2

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
	@$(SAY) "Router"; $(PY) benchmarks/router/alone.py
	@$(SAY) "KV transfer"; $(PY) benchmarks/kv_transfer.py
	@$(SAY) "Speculation"; $(PY) benchmarks/speculation.py
	@$(SAY) "Sparse attention"; $(PY) benchmarks/sparse_attention.py

bench-llama: setup ## Build llama-cpp-python in the cache folder, for benchmarks/throughput.py
	@$(PY) benchmarks/throughput.py --install-llama

bench-gpu: setup ## Measure one GPU into benchmarks/results/gpu.json, in 10 minutes; GPU_FLAGS for run.py
	@$(PY) benchmarks/gpu/run.py --gpus 1 $(GPU_FLAGS)

bench-gpu2: setup ## Measure prefill on one GPU and decode on another, and two as one, in 10 minutes
	@$(PY) benchmarks/gpu/run.py --gpus 2 $(GPU_FLAGS)
