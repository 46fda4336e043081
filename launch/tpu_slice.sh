# shellcheck shell=bash
# Sourced by tpu_vm.sh: `have_slice` makes the slice NAME in ZONE ready, new if it is missing or
# was preempted. TYPE, VERSION and CREATE are for a new one. A preempted slice is asked what it was
# before it is deleted; its network, startup script and the like come from CREATE alone.
: "${DRY_RUN:=0}"
tpu=(gcloud compute tpus tpu-vm)
run() { if [ "$DRY_RUN" = 1 ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
on() { run "${tpu[@]}" ssh "$NAME" "--zone=$ZONE" "--worker=$1" "--command=$2"; }
slice() { run "${tpu[@]}" "$1" "$NAME" "--zone=$ZONE" "${@:2}"; }
describe() { "${tpu[@]}" describe "$NAME" "--zone=$ZONE" "--format=$1"; }
state() { describe "value(state)" 2>&1 || true; }

create() { # further flags
  local new
  read -ra new <<<"--accelerator-type=${TYPE:-v5litepod-16} \
--version=${VERSION:-v2-alpha-tpuv5-lite} ${CREATE-} $*"
  slice create "${new[@]}"
}

recreate() {
  local was type version spot preemptible kind=""
  # As CSV an empty field stays a field; between tabs `read` would lose it.
  was=$(describe "csv[no-heading](acceleratorType,runtimeVersion,schedulingConfig.spot,\
schedulingConfig.preemptible)")
  IFS=, read -r type version spot preemptible <<<"$was"
  : "${TYPE:=${type##*/}}" "${VERSION:=$version}"
  if [ -z "$TYPE" ]; then
    echo "error: $NAME has no accelerator type to make it again by (--topology?): set TYPE" >&2
    exit 2
  fi
  if [[ ! ${CREATE-} =~ --(spot|preemptible|reserved) ]]; then
    case $spot,$preemptible in
      [Tt]rue,*) kind=--spot ;;
      *,[Tt]rue) kind=--preemptible ;;
    esac
  fi
  slice delete --quiet
  create "$kind"
}

have_slice() {
  local found=NOT_FOUND
  [ "$DRY_RUN" = 1 ] || found=$(state)
  case $found in
    *PREEMPTED* | *TERMINATED*) recreate ;;
    *NOT_FOUND*) create ;;
    *STOPPED*) slice start ;;
    READY) ;;
    *)
      echo "error: $NAME: found '$found', expected READY" >&2
      exit 1
      ;;
  esac
}
