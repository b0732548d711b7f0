# The cluster in containers; see docs/compose.md. Variables beside those of the Makefile:
#   COMPOSE_PYTHON_IMAGE  base image, of the Python that .venv has (python:3.11-slim)
#   COMPOSE_TEST_FLAGS    flags of deploy/test/compose_test.py

.PHONY: wheels demo-model compose-up compose-down compose-test

WHEELHOUSE := dist/wheelhouse
# Asked for by redis before Python 3.11.3: the image's Python may be older than the one that collects.
EARLIER_PATCHES := "async-timeout>=4.0.3"
COMPOSE_PYTHON_IMAGE ?= python:$(shell $(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 3.11)-slim
COMPOSE := NANODEPLOY_PYTHON_IMAGE=$(COMPOSE_PYTHON_IMAGE) docker compose -f deploy/compose.yaml

# The dependencies are fetched when what is asked for changed; the project's own wheel is built every time.
wheels: $(WHEELHOUSE)/.dependencies ## Collect dist/wheelhouse, what the images are made of
	@$(SAY) "Building the wheel of NanoDeploy"
	@rm -rf build/lib* build/bdist* $(WHEELHOUSE)/nanodeploy-*.whl
	@$(PIP) wheel -q --no-deps --wheel-dir $(WHEELHOUSE) .

demo-model: setup ## Prepare the demo model and print its folder
	@$(PY) -c "import os, sys; from services.cli.demo_model import ensure_demo_model; \
	    from services.cli.state import cache_root; print(ensure_demo_model(cache_root(os.environ), lambda what: print(what, file=sys.stderr)))"

compose-up: wheels demo-model ## Start the cluster in containers
	@$(COMPOSE) up --build --detach --wait

compose-down: ## Stop it
	@$(COMPOSE) down

compose-test: wheels demo-model ## Build the images, start the cluster in containers, break it, stop it
	@NANODEPLOY_PYTHON_IMAGE=$(COMPOSE_PYTHON_IMAGE) PYTHONPATH=. $(PY) deploy/test/compose_test.py $(COMPOSE_TEST_FLAGS)

$(WHEELHOUSE)/.dependencies: pyproject.toml deploy/compose.mk $(STAMPS)/venv
	@$(SAY) "Fetching $(TORCH) and the other dependencies as wheels"
	@rm -rf $(WHEELHOUSE) && mkdir -p $(WHEELHOUSE)
	@$(PIP) wheel -q --wheel-dir $(WHEELHOUSE) "$(TORCH)" $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)")
	@$(PY) -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
	    >$(WHEELHOUSE)/requirements.txt
	@$(PIP) wheel -q --wheel-dir $(WHEELHOUSE) $(WHEELHOUSE)/torch-*.whl -r $(WHEELHOUSE)/requirements.txt $(EARLIER_PATCHES)
	@touch $@
