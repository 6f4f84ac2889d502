#!/usr/bin/env bash
# Submits a run to a GKE cluster with nothing but kubectl and JobSet: fills in gke_jobset.yaml.
#
#   launch/gke.sh --name=igpt-l --accelerator=tpu-v5p-slice --topology=2x2x4 --image=IMAGE \
#     --service-account=SERVICE_ACCOUNT --mount=BUCKET:/mnt/bucket -- \
#     --config=configs/imagenet32_l.py --workdir=gs://BUCKET/igpt-l \
#     --config.data.data_dir=/mnt/bucket/data
#
# What comes after "--" goes to `python -m igpt_jax.main` on every host, with --distributed. The
# image is launch/Dockerfile's, built with --build-arg PLATFORM=tpu and, for gs://, --build-arg EXTRAS=gcs.
#
#   --name=NAME              the JobSet to make
#   --accelerator=KIND       node label gke-tpu-accelerator: tpu-v5-lite-podslice, tpu-v5p-slice,
#                            tpu-v6e-slice, tpu7x
#   --topology=AxB[xC]       node label gke-tpu-topology
#   --chips-per-host=N       default 4
#   --slices=N               so many slices of that topology, joined by the network; default 1
#   --image=IMAGE            container image, in a registry that the cluster reads
#   --spot                   only on Spot nodes
#   --service-account=NAME   Kubernetes service account, for access to buckets; default: default
#   --mount=BUCKET:DIR       mount a bucket with the Cloud Storage FUSE CSI driver; may be repeated
#   --max-restarts=N         after preemptions and failures; default 50
#   --grace=SECONDS          between SIGTERM and SIGKILL, to save a checkpoint; default: what the config
#                            needs, 120 or more
#   --env=NAME[=VALUE]       environment of the run, in a Kubernetes Secret NAME-env that this makes; without
#                            a value, the one that it has here, which isn't printed; may be repeated
#   --watch=JOB,…            beside it, one JobSet for each of evaluate, probe, sample, quality, which takes
#                            each checkpoint of the run
#   --watch-on=WHERE         what each of those runs on: a topology of the accelerator, one host, or cpu
#   --context=NAME --namespace=NAME   kubectl's; default: its own settings
#   --no-check               don't read the config here first
#   --dry-run                read the config, print the command and what it is fed, run nothing
#
# The JobSet goes on by itself. Any failure restarts it but exit status 2, a mistake in the arguments
# or the config.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" accelerator="" topology="" chips_per_host=4 slices="" image="" spot="" service_account=default
max_restarts=50 grace="" context="" namespace="" watch="" watch_on="" mount=() env=()
read_options --name= --accelerator= --topology= --chips-per-host= --slices= --image= --spot \
  --service-account= --mount+= --max-restarts= --grace= --env+= --watch= --watch-on= --context= \
  --namespace= --no-check -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}
kubectl=(kubectl ${context:+--context="$context"} ${namespace:+--namespace="$namespace"})
need_option name "$name"
need_option accelerator "$accelerator"
need_option topology "$topology"
need_option image "$image"
need_name name "$name"
need_count chips-per-host "$chips_per_host"
need_count max-restarts "$max_restarts"
[ -z "$grace" ] || need_count grace "$grace"
choose_slices "$@"
read_env ${env[@]+"${env[@]}"}
check_watch
check_main_args "$@"
check_mounts mount ${mount[@]+"${mount[@]}"}
check_lasting_workdir ${mount[@]+"${mount[@]}"}

# count_hosts TOPOLOGY: sets `hosts`.
count_hosts() {
  [[ $1 =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    die "--topology=$1; expected AxB or AxBxC, e.g. 4x4 or 4x4x4"
  local chips=$((${1//x/*}))
  [ "$chips_per_host" -gt 0 ] && [ $((chips % chips_per_host)) -eq 0 ] ||
    die "--chips-per-host=$chips_per_host; expected a divisor of the $chips chips of $1"
  hosts=$((chips / chips_per_host))
}
count_hosts "$topology"
need kubectl
for job in ${watched[@]+"${watched[@]}"}; do
  watch_args "$job" "$@"
  slice=""
  if [ "$watch_on" != cpu ]; then
    slice=$accelerator:$watch_on
    count_hosts "$watch_on"
    [ "$hosts" -eq 1 ] ||
      die "--watch-on=$watch_on; expected cpu, or a topology of one host, of $chips_per_host chips"
  fi
  preflight "$slice" "${job_args[@]}"
done
preflight "${slices}x$accelerator:$topology" "${main_args[@]}"
# Of the runs' locks: a JobSet's name is one's alone in its cluster and namespace.
owner=gke/${context:-$(setting_of kubectl current-context)}
owner+=/${namespace:-$(setting_of kubectl view --minify ${context:+--context="$context"} \
  --output='jsonpath={..namespace}')}
# A Spot node's pods get 15 s, unless the node pool is set otherwise.
choose_grace 120 ${spot:+15}

# fill_in NAME TOPOLOGY SLICES ARG…: sets what gke_jobset.yaml names, with the topology cpu for ordinary
# nodes. JSON is YAML, and quotes every argument safely.
# shellcheck disable=SC2034  # render reads them by name
fill_in() {
  local bucket i=0 volumes mount_points arg args=()
  NAME=$(json_strings "$1") SLICES=$3
  if [ "$2" = cpu ]; then
    HOSTS=1 ANNOTATIONS='{}' NODE_SELECTOR='{}' RESOURCES='{}'
  else
    count_hosts "$2"
    HOSTS=$hosts
    ANNOTATIONS='{"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}'
    NODE_SELECTOR="{\"cloud.google.com/gke-tpu-accelerator\": $(json_strings "$accelerator"),"
    NODE_SELECTOR+=" \"cloud.google.com/gke-tpu-topology\": $(json_strings "$2")"
    NODE_SELECTOR+="${spot:+, \"cloud.google.com/gke-spot\": \"true\"}}"
    RESOURCES="{\"limits\": {\"google.com/tpu\": $chips_per_host}}"
  fi
  # The run's owner is the same after every restart. The first start checks before it joins.
  ENV="[{\"name\": \"IGPT_OWNER\", \"value\": $(json_strings "$owner/$1")},"
  ENV+=' {"name": "RESTART_ATTEMPT", "valueFrom": {"fieldRef": {"fieldPath":'
  ENV+=" \"metadata.labels['jobset.sigs.k8s.io/restart-attempt']\"}}}]"
  ENV_FROM='[]'
  if [ ${#variables[@]} -gt 0 ]; then
    ENV_FROM="[{\"secretRef\": {\"name\": $(json_strings "$name-env")}}]"
  fi
  shift 3
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
  for arg in "$@"; do args+=("$(literally "$arg" '$(' '$$(')"); done
  ARGS="[$(json_strings "${args[@]}")]"
  IMAGE=$(json_strings "$image")
  SERVICE_ACCOUNT=$(json_strings "$service_account")
  MAX_RESTARTS=$max_restarts GRACE=$grace
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

# create NAME TOPOLOGY SLICES ARG…
create() {
  fill_in "$@"
  # create, not apply: a JobSet of this name that is there already is someone's run.
  run "${kubectl[@]}" create --filename=- < <(render)
  [ -z "$dry_run" ] || render
}

# secret: prints the Secret with the environment of --env.
secret() {
  local variable data=""
  for variable in "${variables[@]}"; do
    data+=", $(json_strings "${variable%%=*}"): $(json_strings "${variable#*=}")"
  done
  printf '{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": %s}, "stringData": {%s}}\n' \
    "$(json_strings "$name-env")" "${data#, }"
}

create "$name" "$topology" "$slices" "${main_args[@]}" --distributed
made=("jobset/$name")
# After the JobSet, whose pods wait for it: the environment of another run of this name stays as it is.
if [ ${#variables[@]} -gt 0 ]; then
  run "${kubectl[@]}" apply --filename=- < <(secret)
  made+=("secret/$name-env")
fi
for job in ${watched[@]+"${watched[@]}"}; do
  watch_args "$job" "$@"
  [ "$watch_on" = cpu ] || job_args+=(--distributed)
  create "$name-$job" "$watch_on" 1 "${job_args[@]}"
  made+=("jobset/$name-$job")
done
if [ -z "$dry_run" ]; then
  selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
  say "to follow it: $(shell_quote "${kubectl[@]}" logs --follow --selector="$selector")"
  say "to delete it: $(shell_quote "${kubectl[@]}" delete "${made[@]}")"
fi
