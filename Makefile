# Hidden states of vision transformers: extract them into a store, train Raptor blocks from it.
# Every target first makes .venv from requirements.txt if it is missing or stale.
# Variables may be exported, given on the line (make extract LIMIT=100), or kept in an untracked local.mk.
-include local.mk

PYTHON3 ?= python3
PYTHON  := .venv/bin/python
READY   := .venv/.ready

.DEFAULT_GOAL := help

# $(call flag,NAME): --name 'value' if the variable is set.  $(call switch,NAME): --name if it is 1.
lower  = $(subst _,-,$(shell echo '$(1)' | tr 'A-Z' 'a-z'))
quote  = '$(subst ','\'',$(strip $(1)))'
flag   = $(if $(strip $($(1))),--$(call lower,$(1)) $(call quote,$($(1))))
switch = $(if $(filter 1 yes true,$($(1))),--$(call lower,$(1)))
flags  = $(foreach name,$(1),$(call flag,$(name)))

EXTRACT_VARIABLES := IMAGES STORE TEACHER WEIGHTS HEAD IMAGE_SIZE FORMAT PRECISION CODEC SHUFFLE COMPUTE LAYERS LIMIT \
  SAMPLES_PER_SHARD SAMPLES_PER_CHUNK MICRO_BATCH RAY_ADDRESS DEPTH DEVICE MAX_ERROR ENDPOINT_URL
EXTRACT_FLAGS = $(call flags,$(EXTRACT_VARIABLES)) $(if $(strip $(WORKERS)),--workers '$(strip $(WORKERS))') \
  $(call switch,NO_RAY) $(call switch,JOIN) $(ARGS)

help: ## list targets and variables
	@echo "Targets"
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1|\2/' | \
	  awk -F'|' '{printf "  %-14s %s\n", $$1, $$2}'
	@echo ""
	@echo "Variables (default in brackets)"
	@grep -hE '^#: ' $(MAKEFILE_LIST) | sed 's/^#: /  /'
	@echo ""
	@echo "Every door has --help with all options: .venv/bin/python -m pipeline extract --help"

#: IMAGES      digits, a folder of class folders of images or of tars, one with such folders train/ and val/, or
#:             tars by a quoted pattern: 's3://bucket/train-{000..146}.tar'                     [digits]
#: STORE       a store, or the folder of stores train and val                     [data/stores/<name of IMAGES>]
#: TEACHER     any timm ViT, digits_vit, or run:<RUN>: a Raptor    [digits_vit for digits, else DINOv2 ViT-B/14 reg]
#: WEIGHTS     file in timm's or Meta's naming, or random:0                        [timm's pretrained or shipped]
#: HEAD        file of a linear head on [final-norm CLS; mean of final-norm patches]                      [none]
#: FORMAT      zarr or webdataset                                                                        [zarr]
#: PRECISION   of stored patches: float32, float16, bfloat16 or int8                                  [float16]
#: CODEC       none; zarr has lz4, zstd-1 and zstd-3, webdataset has gzip                                [none]
#: MAX_ERROR   relative MSE, such as 1e-4: a PRECISION that loses more is refused on the first shard       [any]
#: COMPUTE     of the teacher: float32, tf32, bfloat16 or float16                                      [float32]
#: LAYERS      states to store, such as 0-12 or 0,6,12                                                    [all]
#: CHECKPOINTS with make curves: what make teacher KEEP= has made                       [data/teachers/digits_vit]
#: RECORDS     with make curves, in their place: an epoch_summaries.jsonl of the Geometry Observatory         [none]
#: RAPTOR_STEPS  of the Raptor that is fitted to each checkpoint, 0.7 s of processor time each; 0: none       [200]
#: STUDY DROP_PATHS  with make study: its folder; chances of a dropped branch         [data/study; 0,0.1,0.2,0.4,0.6]
#: LIMIT       only the first n images of the shuffled order                                              [all]
#: AT          with make stores: a folder, bucket or prefix                                        [data/stores]
#: TO          with make copy and convert: where the copy goes                                [must be given]
#: K           number of spans to cut the depth into                                           [must be given]
#: EPSILON     with make phases: threshold of the max-cut recursion, 0 to 1 of the total distance         [none]
#: OBJECTIVE   normalised_association, cut, cut_per_layer or mean_distance              [normalised_association]
#: STORES      with make gallery: stores or folders of train and val, blanks between                [data/stores/digits]
#: OUT         where make phases, report, positions and gallery save     [data/phases/<store>, data/reports/<store>, ...]
#: BLOCK       a-b: the block takes state a and produces a+1..b                                 [must be given]
#: RUN         folder of a training run                            [data/runs/<store>/<BLOCK>-seed<SEED>]
#: STEPS SEED  length and seed of a training                                                   [the recipe's; 0]
#: BLOCKS      spans of several blocks, 0-7,7-10,10-12, or a JSON of make phases         [the store's saved phases]
#:             with make skips: numbers of blocks, from 1                                          [1,7,10]
#: AT_ONCE     with BLOCK=all: most blocks at a time                              [as GPUs, cores and memory allow]
#: REPLICA     1, 2 or 3: seeds of the published runs, in the place of SEED                             [none]
#: BLOCK_SEEDS with make raptor: seeds of its blocks' runs, 100,101,104; or RUNS=: the runs themselves [SEED]
#: RECIPE      digits_stage1 or imagenet_stage1                                    [the one that fits the store]
#: FROM        with make import: file of published weights, a state dict                         [must be given]
#: HEADS       with make import: attention heads of its blocks                            [one per 64 channels]
#: PARTIAL=1   train on a store that is not finished, with the shards that it has now                      [off]
#: KEEP        with make teacher: epochs whose checkpoints are kept, 0,1,2,5,10,20,40,60; 0 is untrained       [none]
#: TASK        of make probe: imagenet, ade20k, nyuv2 or digits                                 [must be given]
#: EPOCHS BATCH_SIZE LEARNING_RATE   of a probe                                                   [the recipe's]
#: THREADS     of make probe on a CPU               [1 for teachers of fewer than 256 channels, else one per core]
#: LABEL       of a probe: its row in the table                            [teacher's name, or such as Raptor k=3]
#: COMPAT=1    with make probe: restore the published code's defects that its numbers depend on            [off]
#: RUNS PROBES what make table reads: places of runs and of probes, with commas between     [data/runs; data/probes]
#: DEMO SEEDS  with make demo: its folder; Raptors of each kind, 3 for deviations                      [data/demo; 1]
#: DEVICE      cpu, cuda or cuda:0                                                     [the GPU if there is one]
#: JOIN=1      share the work of the jobs that extract into the same store                              [off]
#: ENDPOINT_URL  S3 endpoint, such as http://127.0.0.1:9000            [AWS_ENDPOINT_URL, else Amazon's]
#: PORT        with make s3: where it listens                                                          [9000]
#: RECOMPUTE   with make verify: so many images are made anew and compared (give IMAGES)                  [off]
#: REPAIR=1    with make verify: mend what is wrong (give IMAGES as extracted)                             [off]
#: RAY_ADDRESS a Ray cluster to run on; for make submit its dashboard, http://HOST:8265    [Ray in this machine]
#: CMD         with make submit: a target and its variables, CMD="extract STORE=s3://..."       [must be given]
#: JOB         with make logs and make stop: as make jobs lists it                               [must be given]
#: DETACH=1 WORKING_DIR=1   with make submit: do not follow the job; send the code of this checkout        [off]
#: CPUS GPUS GRACE   with make submit: kept for the command itself; seconds it may take to stop   [0 or 1; 0; 600]
#: WORKERS     teacher actors; of a training, processes that share its batches  [one per GPU, else machine; no Ray]
#: NO_RAY=1    extract in one process                                                                      [off]
#: WHAT        with make deploy: docker, bucket, kubernetes or vms; variables in docs/deploy.md        [must be given]
#: ARGS        further flags, passed on as they are: ARGS="--overwrite"                                   [none]

$(READY): requirements.txt pyproject.toml
	@echo "making .venv from requirements.txt (once; about a minute)"
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON3) -m venv --clear .venv
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	@.venv/bin/uv pip install --quiet --compile-bytecode --python $(PYTHON) --requirements requirements.txt
	@.venv/bin/uv pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable . \
	  --config-settings editable_mode=compat
	@touch $(READY)

.PHONY: help venv extract plan stores inspect copy convert verify phases report curves study positions gallery skips train raptor import probe teacher s3 submit jobs logs stop bench test test-slow check format requirements table demo deploy dashboard watch

venv: $(READY) ## make .venv and nothing else

extract: $(READY) ## images -> store, with hidden states of all layers; again to go on after anything
	@$(PYTHON) -m $(if $(filter run:%,$(TEACHER)),trainer,pipeline) extract $(EXTRACT_FLAGS)

plan: $(READY) ## what make extract would take: bytes, objects, memory, requests, hours, dollars; BLOCK= prices its epoch
	@$(PYTHON) -m pipeline plan $(EXTRACT_FLAGS) $(call flag,BLOCK)

inspect: $(READY) ## what a store holds
	@$(PYTHON) -m storage_schemas inspect $(if $(STORE),$(call quote,$(STORE)),data/stores/digits) $(call flag,ENDPOINT_URL) $(ARGS)

stores: $(READY) ## which stores lie below AT=, and how far each is, without listing their objects
	@$(PYTHON) -m storage_schemas stores $(if $(AT),$(call quote,$(AT)),data/stores) $(call flag,ENDPOINT_URL) $(ARGS)

copy: $(READY) ## mirror a store, or LAYERS= and LIMIT= of it, to TO=, every byte checked; again to go on
	@$(PYTHON) -m storage_schemas copy $(if $(STORE),$(call quote,$(STORE)),data/stores/digits) $(call quote,$(TO)) \
	  $(call flags,LAYERS LIMIT ENDPOINT_URL) $(ARGS)

convert: $(READY) ## copy a store to TO= in another FORMAT= and CODEC=, losslessly
	@$(PYTHON) -m storage_schemas convert $(if $(STORE),$(call quote,$(STORE)),data/stores/digits) $(call quote,$(TO)) \
	  $(call flags,FORMAT CODEC SHUFFLE ENDPOINT_URL) $(ARGS)

verify: $(READY) ## re-read and check every object of a store; REPAIR=1 mends, RECOMPUTE=20 makes images anew
	@$(PYTHON) -m pipeline verify $(EXTRACT_FLAGS) $(call flag,RECOMPUTE) $(call switch,REPAIR)

phases: $(READY) ## cut the depth into spans, with heat map and controls: make phases K=3
	@$(PYTHON) -m analysis phases $(call flags,K STORE EPSILON OBJECTIVE OUT LIMIT ENDPOINT_URL) $(ARGS)

report: $(READY) ## phases, similarity, dynamics and spectra of a store as one HTML page with figures, in OUT=
	@$(PYTHON) -m analysis report $(call flags,STORE RUN K OUT LIMIT SEED DEVICE RAY_ADDRESS ENDPOINT_URL) $(ARGS)

gallery: $(READY) ## layers of several encoders side by side and against each other: make gallery STORES="a b c"
	@$(PYTHON) -m analysis gallery $(if $(strip $(STORES)),--stores $(foreach store,$(STORES),'$(store)')) \
	  $(call flags,OUT K LIMIT ENDPOINT_URL) $(ARGS)

skips: $(READY) ## ViTs trained without the skip connections of one block, on digits; half an hour; again to go on
	@$(PYTHON) -m analysis skips $(call flags,BLOCKS OUT EPOCHS SEED THREADS ENDPOINT_URL) $(ARGS)

positions: $(READY) ## what attention learns of places: planted sets, transfer, permuted images, positional attention; again to go on
	@$(PYTHON) -m analysis positions $(call flags,IMAGES OUT SEEDS EPOCHS STEPS THREADS ENDPOINT_URL) $(ARGS)

curves: $(READY) ## what changes while a teacher is trained, from CHECKPOINTS= of make teacher KEEP=, or RECORDS=
	@$(PYTHON) -m analysis curves $(call flags,CHECKPOINTS RECORDS OUT K RAPTOR_STEPS SEED DEVICE) $(ARGS)

study: $(READY) ## stochastic depth against similarity, phases and fit of Raptors, on digits; hours; again to go on
	@$(PYTHON) -m analysis study $(call flags,STUDY DROP_PATHS EPOCHS SEEDS K RAPTOR_STEPS LIMIT) $(ARGS)

TRAIN_VARIABLES := STORE BLOCKS RUN STEPS SEED REPLICA HEAD DEVICE RECIPE MICRO_BATCH WORKERS RAY_ADDRESS ENDPOINT_URL
TRAIN_FLAGS = $(call flags,$(TRAIN_VARIABLES)) $(call switch,PARTIAL) $(ARGS)

train: $(READY) ## stage 1: train one Raptor block on a store: make train BLOCK=0-7; BLOCK=all: all of BLOCKS=
	@$(PYTHON) -m trainer train $(call flags,BLOCK AT_ONCE) $(TRAIN_FLAGS)

raptor: $(READY) ## stage 2: train finished blocks together: make raptor BLOCKS=0-7,7-10,10-12
	@$(PYTHON) -m trainer raptor $(call flags,BLOCK_SEEDS RUNS) $(call switch,OTHER_STORE) $(TRAIN_FLAGS)

import: $(READY) ## published weights into a RUN: make import FROM=final.pt BLOCKS=0-7,7-10,10-12 STORE=
	@$(PYTHON) -m trainer import $(call flags,FROM BLOCKS RUN STORE TEACHER WEIGHTS HEAD HEADS SEED DEVICE ENDPOINT_URL) $(ARGS)

PROBE_VARIABLES := TASK RUN TEACHER WEIGHTS STORE IMAGES HEAD OUT LABEL SEED EPOCHS BATCH_SIZE LEARNING_RATE COMPUTE DEVICE \
  THREADS ENDPOINT_URL

probe: $(READY) ## a readout on a frozen teacher or Raptor: make probe TASK=digits RUN=; imagenet, ade20k, nyuv2 with IMAGES=
	@$(PYTHON) -m trainer probe $(call flags,$(PROBE_VARIABLES)) $(call switch,COMPAT) $(ARGS)

table: $(READY) ## finished runs and probes side by side, with the paper's numbers and figures: RUNS= PROBES= OUT=
	@$(PYTHON) -m trainer table $(call flags,RUNS PROBES OUT ENDPOINT_URL) $(ARGS)

demo: $(READY) ## the whole story on digits, below DEMO=: extract, phases, both stages, probes, table, figures
	@$(PYTHON) -m analysis demo $(call flags,DEMO SEEDS LIMIT STEPS) $(ARGS)

teacher: $(READY) ## train digits_vit, the small teacher that ships with the project (minutes); KEEP= keeps checkpoints
	@$(PYTHON) -m trainer teacher $(call flags,OUT SEED KEEP) $(ARGS)

s3: $(READY) ## a local S3 server for trying things; prints what to export. PORT=9000, in memory
	@$(PYTHON) -m infra s3 $(call flag,PORT) $(ARGS)

DEPLOY_VARIABLES := BUCKET PREFIX IMAGES WEIGHTS BLOCKS EXTRACT_ARGS TRAIN_ARGS IMAGE CLUSTER REGION ENDPOINT_URL NODES \
  GPUS_PER_NODE CORES_PER_NODE MEMORY_GIB NOTICE_S HOURS NAMESPACE ROLE_ARN S3_SECRET SPOT_LABEL ON_DEMAND_LABEL \
  INSTANCE_TYPE HEAD_INSTANCE_TYPE AMI HEAD_AMI OUT

deploy: $(READY) ## files for a cluster, and what to type with them: WHAT=docker, bucket, kubernetes or vms, IMAGE= BUCKET=
	@$(PYTHON) -m infra deploy $(call quote,$(WHAT)) $(call flags,$(DEPLOY_VARIABLES)) $(if $(filter 0,$(SPOT)),--no-spot) $(ARGS)

submit: $(READY) ## a target as a job of a Ray cluster, followed: make submit CMD="train BLOCK=all STORE=s3://..."
	@$(PYTHON) -m infra submit $(call quote,$(CMD)) $(call flags,RAY_ADDRESS CPUS GPUS GRACE) \
	  $(call switch,DETACH) $(call switch,WORKING_DIR) $(ARGS)

jobs: $(READY) ## the jobs of a Ray cluster, newest first
	@$(PYTHON) -m infra jobs $(call flag,RAY_ADDRESS)

logs: $(READY) ## follow a job of a Ray cluster from its beginning: JOB=
	@$(PYTHON) -m infra logs $(call quote,$(JOB)) $(call flag,RAY_ADDRESS)

stop: $(READY) ## let a job of a Ray cluster finish what is in flight, and stop: JOB=
	@$(PYTHON) -m infra stop $(call quote,$(JOB)) $(call flag,RAY_ADDRESS)

dashboard: $(READY) ## Prometheus, and Grafana where installed, beside the running Ray, until Ctrl-C; RAY_ADDRESS= for a cluster
	@$(PYTHON) -m infra dashboard $(call flag,RAY_ADDRESS) $(ARGS)

watch: $(READY) ## a run as it is now, in the terminal: STORE=, RUN= or RAY_ADDRESS=; ONCE=1 shows one picture
	@$(PYTHON) -m infra watch $(call flags,STORE RUN RAY_ADDRESS ENDPOINT_URL) $(call switch,ONCE) $(ARGS)

bench: $(READY) ## side-by-side benchmarks; results under benchmarks/results/
	@$(PYTHON) -m benchmarks all $(ARGS)

test: $(READY) ## all tests but the slow ones, in two processes
	@$(PYTHON) -m pytest -n 2 $(ARGS)

test-slow: $(READY) ## the slow tests: hundreds of kills and corruptions, and every example of the properties
	@$(PYTHON) -m pytest -m "slow or hypothesis" --hypothesis-profile=every -o faulthandler_timeout=3600 $(ARGS)

check: $(READY) ## lint, format, types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: $(READY) ## let ruff format and sort
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

requirements: $(READY) ## resolve requirements.in into the pinned, universal requirements.txt
	@.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header \
	  --no-emit-index-url requirements.in --output-file requirements.txt
