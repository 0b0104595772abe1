# Everything a fresh machine with Python >= 3.11 needs: `make smoke` trains, exports and checks a small model, `make test`
# runs the tests. TORCH_INDEX: a package index that holds CPU builds of torch, used where there is no NVIDIA GPU.

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/smoke
SFT_RUN := runs/sft_smoke
DATA := data/smoke
CORPUS := $(DATA)/corpus
SHARDS := $(DATA)/shards
CHAT := $(DATA)/chat
SETS := code/train code/validation prose/train prose/validation

# OpenMP threads that spin for long collapse torch where other processes run too; see trinity/__init__.py.
ifndef OMP_WAIT_POLICY
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT ?= 3000
endif
export TOKENIZERS_PARALLELISM := true

.PHONY: smoke sft-smoke quick test test-slow lint docs venv data data-sft clean help

help:
	@echo "make smoke | sft-smoke | test | test-slow | lint | docs | venv | data | data-sft | clean"
	@echo "make test TEST_WORKERS=4    more tests at once; each worker takes 1 to 2 GB"
	@echo "make quick    the core's tests in a few minutes, while working; test runs all but the slow ones"

venv: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" bash tools/install.sh $(VENV)
	touch $@

data: venv
	$(BIN)/python tools/prepare_corpus.py --out $(CORPUS)
	$(BIN)/python tools/train_tokenizer.py --input $(CORPUS)/code.train.jsonl $(CORPUS)/prose.train.jsonl \
		--vocab-size 8192 --out $(DATA)/tokenizer
	for set in $(SETS); do \
		$(BIN)/python tools/prepare_data.py --input $(CORPUS)/$$(echo $$set | tr / .).jsonl \
			--tokenizer $(DATA)/tokenizer --out $(SHARDS)/$$set || exit $$?; \
	done

# Conversations for fine-tuning the smoke model, and a tokenizer with the markers of a chat; see docs/fine_tune.md.
data-sft: venv
	test -f $(DATA)/tokenizer/tokenizer.json || $(MAKE) data
	$(BIN)/python tools/prepare_corpus.py --chat --out $(CORPUS)
	$(BIN)/python tools/chat_tokenizer.py --tokenizer $(DATA)/tokenizer --out $(CHAT)/tokenizer --ids last
	for set in train validation; do \
		$(BIN)/python tools/prepare_data.py --chat --input $(CORPUS)/chat.$$set.jsonl --max-tokens 256 --too-long drop \
			--tokenizer $(CHAT)/tokenizer --out $(CHAT)/$$set || exit $$?; \
	done

smoke: data
	$(BIN)/python launch/pretrain.py configs/smoke.yaml run.dir=$(RUN)
	$(BIN)/python tools/smoke_summary.py $(RUN) --out $(RUN)/hf/final

# The model of `make smoke`, which is trained first if it is not there, fine-tuned to answer in a chat.
sft-smoke: data-sft
	test -f $(RUN)/hf/final/config.json || $(MAKE) smoke
	$(BIN)/python launch/pretrain.py configs/sft_smoke.yaml run.dir=$(SFT_RUN) init.run=$(RUN)
	$(BIN)/python tools/smoke_summary.py $(SFT_RUN) --out $(SFT_RUN)/hf/final

# Model, balancing, optimizers, data, config, interop, evaluation, one training step, and the pages of docs/.
# Not here: kernels in Triton's interpreter (90 s), plans, and runs, launchers and meshes, which start processes.
QUICK := $(addprefix tests/,test_balancing.py test_transformers_equality.py test_layers.py models optim data config interop \
	evaluation kernels docs training/test_train_step.py)

quick: venv
	$(BIN)/python -m pytest $(QUICK) --ignore-glob='*_triton.py' -m "not slow and not processes" $(XDIST)

# A file's tests stay together, as they share fixtures and groups of processes.
TEST_WORKERS ?= 2
XDIST := -n $(TEST_WORKERS) --dist loadfile

test: venv
	$(BIN)/python -m pytest -m "not slow" $(XDIST)

test-slow: venv
	$(BIN)/python -m pytest -m slow $(XDIST)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv
	$(BIN)/python -m trinity.config.reference > docs/config.md.new
	mv docs/config.md.new docs/config.md

clean:
	rm -rf $(VENV) $(DATA) $(RUN) $(SFT_RUN) build *.egg-info .pytest_cache .ruff_cache
