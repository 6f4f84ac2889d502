#!/usr/bin/env bash
# Submits a run to a GKE cluster with nothing but kubectl and JobSet: fills in gke_jobset.yaml.
#
#   launch/gke.sh --name=igpt-l --accelerator=tpu-v5p-slice --topology=4x4x4 --image=IMAGE \
#     --mount=BUCKET:/mnt/bucket -- \
#     --config=configs/imagenet32_l.py --workdir=/mnt/bucket/igpt-l
#
# What comes after "--" goes to `python -m igpt_jax.main` on every host, with --distributed. The
# image is launch/Dockerfile's, built with --build-arg PLATFORM=tpu.
#
#   --name=NAME              the JobSet to make
#   --accelerator=KIND       node label gke-tpu-accelerator: tpu-v5-lite-podslice, tpu-v5p-slice,
#                            tpu-v6e-slice, tpu7x
#   --topology=AxB[xC]       node label gke-tpu-topology
#   --chips-per-host=N       default 4
#   --image=IMAGE            container image, in a registry that the cluster reads
#   --spot                   only on Spot nodes
#   --service-account=NAME   Kubernetes service account, for access to buckets; default: default
#   --mount=BUCKET:DIR       mount a bucket with the Cloud Storage FUSE CSI driver; may be repeated
#   --max-restarts=N         after preemptions and failures; default 50
#   --grace=SECONDS          between SIGTERM and SIGKILL, to save a checkpoint; default 120
#   --context=NAME --namespace=NAME   kubectl's; default: its own settings
#   --dry-run                print the command and what it is fed, run nothing
#
# The JobSet goes on by itself. Any failure restarts it but exit status 2, a mistake in the arguments
# or the config.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" accelerator="" topology="" chips_per_host=4 image="" spot="" service_account=default
max_restarts=50 grace=120 context="" namespace="" mount=()
read_options --name= --accelerator= --topology= --chips-per-host= --image= --spot --service-account= \
  --mount+= --max-restarts= --grace= --context= --namespace= -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}
kubectl=(kubectl ${context:+--context="$context"} ${namespace:+--namespace="$namespace"})
need_option name "$name"
need_option accelerator "$accelerator"
need_option topology "$topology"
need_option image "$image"
need_name name "$name"
need_count chips-per-host "$chips_per_host"
need_count max-restarts "$max_restarts"
need_count grace "$grace"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  die "--topology=$topology; expected AxB or AxBxC, e.g. 4x4 or 4x4x4"
chips=$((${topology//x/*}))
[ "$chips_per_host" -gt 0 ] && [ $((chips % chips_per_host)) -eq 0 ] ||
  die "--chips-per-host=$chips_per_host; expected a divisor of the $chips chips of $topology"
check_main_args "$@"
check_mounts mount ${mount[@]+"${mount[@]}"}
check_lasting_workdir ${mount[@]+"${mount[@]}"}
need kubectl

# Sets what gke_jobset.yaml names; JSON is YAML, and quotes every argument safely.
# shellcheck disable=SC2034  # render reads them by name
fill_in() {
  local bucket i=0 volumes mount_points arg args=()
  volumes='{"name": "shm", "emptyDir": {"medium": "Memory"}}'
  mount_points='{"name": "shm", "mountPath": "/dev/shm"}'
  POD_ANNOTATIONS='{}'
  for bucket in ${mount[@]+"${mount[@]}"}; do
    POD_ANNOTATIONS='{"gke-gcsfuse/volumes": "true"}'
    volumes+=", {\"name\": \"bucket-$i\", \"csi\": {\"driver\": \"gcsfuse.csi.storage.gke.io\","
    volumes+=" \"volumeAttributes\": {\"bucketName\": $(json_strings "${bucket%%:*}"),"
    volumes+=" \"mountOptions\": \"implicit-dirs,rename-dir-limit=$RENAME_LIMIT\"}}}"
    mount_points+=", {\"name\": \"bucket-$i\", \"mountPath\": $(json_strings "${bucket#*:}")}"
    i=$((i + 1))
  done
  VOLUMES="[$volumes]" VOLUME_MOUNTS="[$mount_points]"
  # Kubernetes replaces $(NAME) in arguments, and $$(NAME) by $(NAME).
  # shellcheck disable=SC2016
  for arg in "$@" --distributed; do args+=("$(literally "$arg" '$(' '$$(')"); done
  ARGS="[$(json_strings "${args[@]}")]"
  NAME=$(json_strings "$name")
  IMAGE=$(json_strings "$image")
  SERVICE_ACCOUNT=$(json_strings "$service_account")
  MAX_RESTARTS=$max_restarts GRACE=$grace CHIPS_PER_HOST=$chips_per_host
  HOSTS=$((chips / chips_per_host))
  NODE_SELECTOR="{\"cloud.google.com/gke-tpu-accelerator\": $(json_strings "$accelerator"),"
  NODE_SELECTOR+=" \"cloud.google.com/gke-tpu-topology\": $(json_strings "$topology")"
  NODE_SELECTOR+="${spot:+, \"cloud.google.com/gke-spot\": \"true\"}}"
}

render() {
  local line variable
  while IFS= read -r line; do
    # Comments, and lines with ${VARIABLE} in them.
    if [[ $line == "#"* ]]; then continue; fi
    if [[ $line =~ ^([^$]*)"\${"([A-Z_]+)"}"$ ]]; then
      variable=${BASH_REMATCH[2]}
      line=${BASH_REMATCH[1]}${!variable}
    fi
    printf '%s\n' "$line"
  done <"$LAUNCH_DIR/gke_jobset.yaml"
}

fill_in "$@"
# create, not apply: a JobSet of this name that is there already is someone's run.
run "${kubectl[@]}" create --filename=- < <(render)
if [ -n "$dry_run" ]; then
  render
else
  selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
  say "to follow it: $(shell_quote "${kubectl[@]}" logs --follow --selector="$selector")"
  say "to delete it: $(shell_quote "${kubectl[@]}" delete jobset "$name")"
fi
