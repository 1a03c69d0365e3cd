#!/usr/bin/env bash
# Submits a run to the TPUs of a GKE cluster by XPK; --help has all options.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
Usage: scripts/gke.sh --cluster NAME --zone ZONE --workload NAME --type TYPE --image IMAGE
                      [OPTION...] -- ARG...

Creates an XPK workload (https://github.com/AI-Hypercomputer/xpk) with
`python -m stackjax.train ARG...` on every host of a TPU slice in a GKE cluster.

  --cluster NAME       cluster made by `xpk cluster create`
  --zone ZONE          zone of the cluster
  --workload NAME      name of the workload
  --type TYPE          accelerator type, such as v5litepod-64
  --image IMAGE        container image with this directory and its requirements
  --restarts N         restarts after a lost host; each resumes the run (10)
  --grace SECONDS      time to save when a host is preempted (300)
  --dry-run            print the command without running it
  --help               print this

The project comes from `gcloud config`. Data and --workdir must be on gs://.
EOF
}

fail() {
  echo "error: $1; scripts/gke.sh --help lists all options." >&2
  exit 2
}

run() {
  local word quote="'\\''"
  if [[ -z "$dry_run" ]]; then
    "$@"
    return
  fi
  for word; do
    [[ "$word" != *[!A-Za-z0-9_./:=-]* ]] || word="'${word//\'/$quote}'"
    printf '%s ' "$word"
  done
  echo
}

cluster='' zone='' workload='' type='' image='' restarts=10 grace=300 dry_run=''
while (($#)); do
  case "$1" in
    --cluster | --zone | --workload | --type | --image | --restarts | --grace)
      [[ -n "${2:-}" && "$2" != --* ]] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry_run=yes && shift ;;
    --help) usage && exit ;;
    --) break ;;
    *) fail "unknown option $1" ;;
  esac
done
for option in cluster zone workload type image; do
  [[ -n "${!option}" ]] || fail "--$option is missing"
done
(($# > 1)) || fail "nothing to train; end with -- --config FILE"

# XPK runs the command in a shell, and sends SIGTERM to that: so exec.
run xpk workload create --cluster="$cluster" --zone="$zone" --workload="$workload" \
  --tpu-type="$type" --docker-image="$image" --max-restarts="$restarts" \
  --termination-grace-period-seconds="$grace" \
  --command="exec python -m stackjax.train$(printf ' %q' "${@:2}")"
first="xpk.google.com/workload=$workload,batch.kubernetes.io/job-completion-index=0"
echo "# follow: kubectl logs --follow --selector=$first"
echo "# save and stop: xpk workload delete --cluster=$cluster --zone=$zone --workload=$workload"
