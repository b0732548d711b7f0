# Benchmarks on this machine's CPU; see benchmarks/README.md. On a machine that does nothing else.

.PHONY: bench-cpu bench-llama

bench-cpu: setup ## Measure throughput, cost at rest, router and KV transfer into benchmarks/results
	@$(SAY) "Throughput, 16 at once";  $(PY) benchmarks/throughput.py --concurrency 16
	@$(SAY) "Throughput, 1 at a time"; $(PY) benchmarks/throughput.py --concurrency 1 --append
	@$(SAY) "Throughput, 64 at once, but llama.cpp"; $(PY) benchmarks/throughput.py \
	    --concurrency 64 --rounds 1 --append --without "llama.cpp Q4_1"
	@$(SAY) "Throughput, 64 at once, but transformers in bf16"; $(PY) benchmarks/throughput.py \
	    --concurrency 64 --rounds 2 --append --without "transformers bf16"
	@$(SAY) "Cost at rest"; $(PY) benchmarks/at_rest.py
	@$(SAY) "Router"; $(PY) benchmarks/router.py
	@$(SAY) "KV transfer"; $(PY) benchmarks/kv_transfer.py

bench-llama: setup ## Build llama-cpp-python in the cache folder, for benchmarks/throughput.py
	@$(PY) benchmarks/throughput.py --install-llama
