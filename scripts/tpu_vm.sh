#!/usr/bin/env bash
# Creates a TPU VM slice and trains on all hosts; --help has all options.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
Usage: scripts/tpu_vm.sh ACTION --name NAME --zone ZONE [OPTION...] [-- ARG...]

Runs `python -m stackjax.train ARG...` on every host of a Cloud TPU VM slice. Actions, in the
order of use:

  create     requests the slice; the request is queued until a slice is available
  install    copies this directory to every host, and installs the requirements
  run        starts or resumes the run on every host
  log        follows the output of the run, until Ctrl-C
  stop       saves and stops the run
  delete     deletes the slice

  --name NAME          name of the slice
  --zone ZONE          zone of the slice
  --type TYPE          for create: accelerator type, such as v5litepod-64
  --version VERSION    for create: host software, such as v2-alpha-tpuv5-lite
  --spot               for create: cheaper, but preemptible
  --dry-run            print the commands without running them
  --help               print this

The project comes from `gcloud config`. Data and --workdir must be on gs://, so every host sees
the files and they survive the slice.
EOF
}

fail() {
  echo "error: $1; scripts/tpu_vm.sh --help lists all options." >&2
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

on() { # WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

action="${1:-}" required='name zone'
case "$action" in
  create) required='name zone type version' ;;
  install | run | log | stop | delete) ;;
  --help) usage && exit ;;
  '' | -*) fail "the action is missing" ;;
  *) fail "unknown action $action" ;;
esac
shift
name='' zone='' type='' version='' spot='' dry_run=''
while (($#)); do
  case "$1" in
    --name | --zone | --type | --version)
      [[ -n "${2:-}" && "$2" != --* ]] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot) spot=yes && shift ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry_run=yes && shift ;;
    --help) usage && exit ;;
    --) break ;;
    *) fail "unknown option $1" ;;
  esac
done
for option in $required; do
  [[ -n "${!option}" ]] || fail "--$option is missing"
done

case "$action" in
  create)
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
    echo "# install when this says ACTIVE: gcloud compute tpus queued-resources describe $name" \
      "--zone=$zone --format='value(state.state)'"
    ;;
  install)
    archive="${TMPDIR:-/tmp}/$name.tar.gz"
    run tar -czf "$archive" --exclude=./.git --exclude=./.venv --exclude=./data --exclude=./runs .
    run gcloud compute tpus tpu-vm scp "$archive" "$name:stackjax.tar.gz" --zone="$zone" \
      --worker=all
    # The system Python may be too old; uv installs 3.11. Without huge pages TPUs start slowly.
    on all 'set -e
mkdir -p stackjax
tar -xzf stackjax.tar.gz -C stackjax
cd stackjax
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --quiet --allow-existing --python 3.11 .venv
~/.local/bin/uv pip install --quiet --python .venv -r requirements-tpu.txt
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled'
    ;;
  run)
    (($# > 1)) || fail "nothing to train; end with -- --config FILE"
    on all "cd stackjax
nohup .venv/bin/python -m stackjax.train$(printf ' %q' "${@:2}") >>train.log 2>&1 </dev/null &
echo \$! >train.pid"
    echo "# follow: scripts/tpu_vm.sh log --name $name --zone $zone"
    ;;
  log) on 0 'tail -n 100 -F stackjax/train.log' ;;
  stop) on all 'xargs kill -TERM <stackjax/train.pid' ;;
  delete) run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ;;
esac
