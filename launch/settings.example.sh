# Settings of launch/pod.sh and gke.sh. Copy to launch/settings.sh (git ignores it) and fill in.
# shellcheck shell=bash disable=SC2034  # read by the scripts that source this file

# --- the run
RUN=my-run                              # names all resources; lower case, digits, "-"
CONFIG=configs/lemur_7b_pretrain.py     # or PATH:ARGUMENT; must be committed: `git archive HEAD` is pushed
WORKDIR=                                # gs://BUCKET/...
OVERRIDES=()                            # e.g. (--config.train.steps=1000)
SMOKE=()                                # arguments of `lemur smoke`: (--checkpoint gs://... --mesh fsdp=8 --dtype bfloat16)
ENVIRONMENT=()                          # e.g. (LIBTPU_INIT_ARGS=--xla_...); never a secret

# --- TPUs (launch/pod.sh, launch/gke.sh)
PROJECT=                                # as `gcloud projects list` shows it
ZONE=
ACCELERATOR=                            # e.g. v4-512, v5litepod-256, v5p-128, v6e-64
SLICES=1                                # > 1: joined by the data-centre network
PROVISIONING=on-demand                  # on-demand, spot or reserved

# --- TPU VMs (launch/pod.sh)
# Secrets: a local file of NAME=value lines in bash syntax, mode 600. It is copied to the workers, where the run reads
# it; it never appears in an argument or a log. Empty: none.
SECRETS_FILE=
RUNTIME=                                # VM image, e.g. tpu-ubuntu2204-base or v2-alpha-tpuv6e
CREATE_FLAGS=()                         # more flags of `gcloud compute tpus queued-resources create`
SSH_FLAGS=()                            # e.g. (--tunnel-through-iap)

# --- timeouts and retries
SSH_SECONDS=900                         # timeout of one command on all workers
RETRIES=3                               # attempts of a command that fails on a worker
POLL_SECONDS=60                         # seconds between two status checks of `watch`
MAX_RESTARTS=20                         # restarts after crashes of the run before `watch` stops
DELETE_WHEN_FINISHED=yes                # `watch` deletes the slice at the end: yes or no

# --- GKE (launch/gke.sh)
CLUSTER=                                # name of the cluster, as `xpk cluster list` shows it
IMAGE=                                  # container image with this package, its extra "tpu" and the configs
XPK_FLAGS=()                            # more flags of `xpk workload create`
