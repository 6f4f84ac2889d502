#!/usr/bin/env bash
# Submits a run to a GKE cluster that xpk manages (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/xpk.sh --name=igpt-l --cluster=CLUSTER --type=v5p-128 --image=IMAGE \
#     --storage=STORAGE:/mnt/storage -- \
#     --config=configs/imagenet32_l.py --workdir=/mnt/storage/igpt-l
#
# What comes after "--" goes to `python -m igpt_jax.main` on every host, with --distributed. The
# image is launch/Dockerfile's, built with --build-arg PLATFORM=tpu.
#
#   --name=NAME          the workload to make
#   --cluster=CLUSTER    where
#   --type=TYPE          TPU type: v5litepod-16, v5p-128, v6e-64, tpu7x-64, …
#   --image=IMAGE        container image, in a registry that the cluster reads
#   --storage=NAME:DIR   a storage of the cluster (xpk storage attach) that it mounts at DIR; may be
#                        repeated
#   --project=PROJECT    default: gcloud's own setting
#   --zone=ZONE          default: gcloud's own setting
#   --max-restarts=N     after preemptions and failures; default 50
#   --grace=SECONDS      between SIGTERM and SIGKILL, to save a checkpoint; default 120
#   --xpk-flag=FLAG      one more flag for `xpk workload create`, e.g. --priority=high; may be repeated
#   --dry-run            print the command, run nothing
#
# The workload goes on by itself. Any failure restarts it but exit status 2, a mistake in the
# arguments or the config. To follow it: kubectl logs, or the link that xpk prints. To delete it:
# xpk workload delete --workload=NAME --cluster=CLUSTER.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" cluster="" type="" image="" project="" zone="" max_restarts=50 grace=120
storage=() xpk_flag=()
read_options --name= --cluster= --type= --image= --storage+= --project= --zone= --max-restarts= \
  --grace= --xpk-flag+= -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}
need_option name "$name"
need_option cluster "$cluster"
need_option type "$type"
need_option image "$image"
need_name name "$name"
need_count max-restarts "$max_restarts"
need_count grace "$grace"
check_main_args "$@"
check_mounts storage ${storage[@]+"${storage[@]}"}
check_lasting_workdir ${storage[@]+"${storage[@]}"}
for mount in ${storage[@]+"${storage[@]}"}; do xpk_flag+=(--storage="${mount%%:*}"); done
[ -z "$project" ] || xpk_flag+=(--project="$project")
[ -z "$zone" ] || xpk_flag+=(--zone="$zone")
need xpk kubectl

# xpk writes the command into a shell script of its own; exec lets its SIGTERM through.
run xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" \
  --docker-image="$image" --max-restarts="$max_restarts" --restart-on-exit-codes=1,3-126 \
  --termination-grace-period-seconds="$grace" ${xpk_flag[@]+"${xpk_flag[@]}"} \
  --command="exec bash launch/entry.sh $(shell_quote "$@" --distributed)"
