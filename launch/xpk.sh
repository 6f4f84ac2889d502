#!/usr/bin/env bash
# Submits a run to a GKE cluster that xpk manages (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/xpk.sh --name=igpt-l --cluster=CLUSTER --type=v5p-32 --image=IMAGE \
#     --storage=STORAGE:/mnt/storage -- \
#     --config=configs/imagenet32_l.py --workdir=gs://BUCKET/igpt-l \
#     --config.data.data_dir=/mnt/storage/data
#
# What comes after "--" goes to `python -m igpt_jax.main` on every host, with --distributed. The
# image is launch/Dockerfile's, built with --build-arg PLATFORM=tpu and, for gs://, --build-arg EXTRAS=gcs.
#
#   --name=NAME          the workload to make
#   --cluster=CLUSTER    where
#   --type=TYPE          TPU type: v5litepod-16, v5p-128, v6e-64, tpu7x-64, …
#   --slices=N           so many slices of that type, joined by the network; default 1
#   --image=IMAGE        container image, in a registry that the cluster reads
#   --storage=NAME:DIR   a storage of the cluster (xpk storage attach) that it mounts at DIR; may be
#                        repeated
#   --project=PROJECT    default: gcloud's own setting
#   --zone=ZONE          default: gcloud's own setting
#   --max-restarts=N     after preemptions and failures; default 50
#   --grace=SECONDS      between SIGTERM and SIGKILL, to save a checkpoint; default: what the config needs,
#                        120 or more
#   --env=NAME[=VALUE]   environment of the run, by a file for xpk; without a value, the one that it has
#                        here, which isn't printed; may be repeated
#   --watch=JOB,…        beside it, one workload for each of evaluate, probe, sample, quality, which takes each
#                        checkpoint of the run
#   --watch-on=TYPE      what each of those runs on: a TPU type, or xpk's name of CPU machines, such as
#                        n2-standard-32-1
#   --xpk-flag=FLAG      one more flag for `xpk workload create`, e.g. --priority=high; may be repeated
#   --no-check           don't read the config here first
#   --dry-run            read the config, print the command, run nothing
#
# The workload goes on by itself. Any failure restarts it but exit status 2, a mistake in the
# arguments or the config. To follow it: kubectl logs, or the link that xpk prints. To delete it:
# xpk workload delete --workload=NAME --cluster=CLUSTER.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" cluster="" type="" slices="" image="" project="" zone="" max_restarts=50 grace=""
watch="" watch_on="" storage=() xpk_flag=() env=()
read_options --name= --cluster= --type= --slices= --image= --storage+= --project= --zone= \
  --max-restarts= --grace= --env+= --watch= --watch-on= --xpk-flag+= --no-check -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}
need_option name "$name"
need_option cluster "$cluster"
need_option type "$type"
need_option image "$image"
need_name name "$name"
need_count max-restarts "$max_restarts"
[ -z "$grace" ] || need_count grace "$grace"
choose_slices "$@"
read_env ${env[@]+"${env[@]}"}
check_watch
check_main_args "$@"
check_mounts storage ${storage[@]+"${storage[@]}"}
check_lasting_workdir ${storage[@]+"${storage[@]}"}
watch_kind=device-type
if [[ $watch_on =~ ^(v[0-9]|tpu) ]]; then watch_kind=tpu-type; fi
need xpk kubectl
for job in ${watched[@]+"${watched[@]}"}; do
  watch_args "$job" "$@"
  if [ "$watch_kind" = tpu-type ]; then slice=$watch_on; else slice=""; fi
  preflight "$slice" "${job_args[@]}"
done
preflight "${slices}x$type" "${main_args[@]}"
choose_grace 120
for mount in ${storage[@]+"${storage[@]}"}; do xpk_flag+=(--storage="${mount%%:*}"); done
[ -z "$project" ] || xpk_flag+=(--project="$project")
[ -z "$zone" ] || xpk_flag+=(--zone="$zone")

if [ ${#variables[@]} -gt 0 ]; then
  # Not on the command line, which others on this machine may read.
  file=${TMPDIR:-/tmp}/igpt_jax.XXXXXX
  if [ -z "$dry_run" ]; then
    file=$(mktemp "$file")
    trap 'rm -f "$file"' EXIT
    printf '%s\n' "${variables[@]}" >"$file"
  fi
  xpk_flag+=(--env-file="$file")
fi

# Of the runs' locks: a workload's name is one's alone in its cluster.
owners=xpk/${project:-$(setting_of gcloud get-value project)}
owners+=/${zone:-$(setting_of gcloud get-value compute/zone)}/$cluster

# create NAME KIND TYPE SLICES ARG…: a workload. Its owner is the same after every restart. The first host
# looks before each start, restarts too: that it is one stands in a label of the pod, which xpk doesn't hand
# to the container. xpk writes the command into a shell script of its own; exec lets its
# SIGTERM through.
create() {
  local workload=$1 where=("--$2=$3" --num-slices="$4") owner
  owner=$(shell_quote "IGPT_OWNER=$owners/$1")
  shift 4
  run xpk workload create --workload="$workload" --cluster="$cluster" "${where[@]}" \
    --docker-image="$image" --max-restarts="$max_restarts" --restart-on-exit-codes=1,3-126 \
    --termination-grace-period-seconds="$grace" ${xpk_flag[@]+"${xpk_flag[@]}"} \
    --command="export $owner RESTART_ATTEMPT=0; exec bash launch/entry.sh $(shell_quote "$@")"
}

create "$name" tpu-type "$type" "$slices" "${main_args[@]}" --distributed
for job in ${watched[@]+"${watched[@]}"}; do
  watch_args "$job" "$@"
  [ "$watch_kind" = device-type ] || job_args+=(--distributed)
  create "$name-$job" "$watch_kind" "$watch_on" 1 "${job_args[@]}"
done
